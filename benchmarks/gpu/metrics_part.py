"""The statistics of the gap on the device: all of ours against what verl computes of the same batch once a step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import Memory, Settings, alternated, durations  # noqa: E402
from mismatch_metrics import make_batch, verls  # noqa: E402


def metrics(settings: Settings) -> dict[str, Any]:
    """Seconds of both sides, and the most memory of one call above that of the batch."""
    batch = {name: tensor.to(settings.device) for name, tensor in make_batch(settings.rows).items()}

    def ours(_: int) -> None:
        from verl_fp16.mismatch.statistics import GapStatistics

        gap = GapStatistics(settings.device)
        gap.add(batch["rollout_log_probs"], batch["old_log_probs"], batch["response_mask"])
        gap.scalars()

    sides = {"verl": lambda _: verls(batch), "verl_fp16": ours}
    for side in sides.values():
        side(0)
    memory, peaks = Memory(settings.device), {}
    for name, side in sides.items():
        before = memory.now()
        peaks[name] = max(0, memory.peak_of(lambda side=side: side(0)) - before)
    found = durations(alternated(sides, settings), "verl")
    for name, peak in peaks.items():
        found["sides"][name]["peak_bytes"] = peak
    return found | {"tokens": int(batch["response_mask"].sum()), "rows": settings.rows}
