"""What the statistics of the gap cost: all of ``GapStatistics`` against what verl computes of the same batch.

    python benchmarks/mismatch_metrics.py [--pairs 15] [--out outputs/mismatch-metrics.json]

verl: ``calculate_debug_metrics`` and ``compute_offpolicy_metrics``, which its trainers call once a step on the driver.
The batch: 2048 x 4096 float32, an int64 mask, lengths drawn evenly from 1 to 4096. The two take turns in one process,
which of them goes first is swapped from pair to pair; compared is the median of the pairs' ratios, with its quartiles.
Of neighbours that are both verl's, the same median says how much of it is noise.

Memory is the highest resident size of a process of its own during one call, less what it was before. The last table is
ours alone on 1 to 64 million tokens: time and memory must be linear and flat.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from off_cost import machine_facts, write_result  # noqa: E402

ROWS, POSITIONS = 2048, 4096
SIZES = tuple(2**20 * millions for millions in (1, 4, 16, 64))


def make_batch(rows: int, ragged: bool = True) -> dict[str, Any]:
    """Log-probabilities with a gap of 1e-3 nats."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rollout = torch.rand(rows, POSITIONS, generator=generator).mul_(-3)
    training = torch.randn(rows, POSITIONS, generator=generator).mul_(1e-3).add_(rollout)
    lengths = torch.randint(1, POSITIONS + 1, (rows, 1), generator=generator) if ragged else POSITIONS
    mask = (torch.arange(POSITIONS) < lengths).long().expand(rows, POSITIONS).contiguous()
    rollout *= mask
    training *= mask
    return {"rollout_log_probs": rollout, "old_log_probs": training, "response_mask": mask, "responses": mask}


def ours(batch: dict[str, Any]) -> None:
    from verl_fp16.mismatch.statistics import GapStatistics

    statistics_ = GapStatistics()
    statistics_.add(batch["rollout_log_probs"], batch["old_log_probs"], batch["response_mask"])
    statistics_.scalars()


def verls(batch: dict[str, Any]) -> None:
    from types import SimpleNamespace

    from verl.trainer.ppo.rollout_corr_helper import compute_offpolicy_metrics
    from verl.utils.debug.metrics import calculate_debug_metrics

    calculate_debug_metrics(SimpleNamespace(batch=batch))
    compute_offpolicy_metrics(batch["old_log_probs"], batch["rollout_log_probs"], batch["response_mask"])


SIDES = {"ours": ours, "verl": verls}


def seconds(side: str, batch: dict[str, Any]) -> float:
    start = time.perf_counter()
    SIDES[side](batch)
    return time.perf_counter() - start


def measure_pairs(pairs: int) -> dict[str, Any]:
    batch = make_batch(ROWS)
    for side in SIDES:
        seconds(side, batch)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for index in range(pairs):
        for side in sorted(SIDES, reverse=bool(index % 2)):
            times[side].append(seconds(side, batch))
    ratios = [a / b for a, b in zip(times["ours"], times["verl"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "pairs": pairs,
        "tokens": int(batch["response_mask"].sum()),
        "seconds": {side: statistics.median(values) for side, values in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [low, high],
        "ratio_of_noise": statistics.median(
            b / a for a, b in zip(times["verl"][::2], times["verl"][1::2], strict=False)
        ),
    }


def measure_memory(side: str, rows: int, ragged: bool) -> dict[str, Any]:
    """Of one call after one on a small batch, which loads what is loaded once; and the time of a second one."""
    batch = make_batch(rows, ragged)
    SIDES[side](make_batch(1))
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size is counted from here on
    before = _resident("VmRSS")
    SIDES[side](batch)
    extra = _resident("VmHWM") - before
    runs = [seconds(side, batch) for _ in range(5)]
    return {"tokens": int(batch["response_mask"].sum()), "extra_bytes": extra, "seconds": statistics.median(runs)}


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024


def in_child(side: str, rows: int, ragged: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", side, "--rows", str(rows), *(["--ragged"] if ragged else [])]
    done = subprocess.run(command, env={**os.environ, "VERL_PLATFORM": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the measurement failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_tables(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{ROWS} x {POSITIONS}, ragged; {result['machine']}, {result['date']}", title_justify="left")
    for column in ("", "time, s", "extra memory, MB"):
        table.add_column(column, justify="right")
    for side, memory in result["memory"].items():
        table.add_row(side, f"{result['time']['seconds'][side]:.3f}", f"{memory['extra_bytes'] / 1e6:.0f}")
    low, high = result["time"]["ratio_quartiles"]
    noise = result["time"]["ratio_of_noise"]
    table.caption = f"ours over verl: {result['time']['ratio']:.2f} [{low:.2f}, {high:.2f}], of noise {noise:.2f}"
    sizes = Table(title="ours, by tokens", title_justify="left")
    for column in ("tokens", "time, s", "ns a token", "extra memory, MB"):
        sizes.add_column(column, justify="right")
    for row in result["sizes"]:
        nanoseconds, megabytes = row["seconds"] / row["tokens"] * 1e9, row["extra_bytes"] / 1e6
        sizes.add_row(f"{row['tokens']:,}", f"{row['seconds']:.3f}", f"{nanoseconds:.1f}", f"{megabytes:.0f}")
    console = Console(width=100)
    console.print(table)
    console.print(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("outputs") / "mismatch-metrics.json")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ragged", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pairs < 4:
        parser.error("--pairs must be at least 4, for quartiles and for the ratio of noise")
    if options.child:
        print(json.dumps(measure_memory(options.child, options.rows, options.ragged)))
        return
    load = os.getloadavg()[0]
    os.environ["VERL_PLATFORM"] = "cpu"
    result = {
        **machine_facts(),
        "load_before": load,
        "rows": ROWS,
        "positions": POSITIONS,
        "time": measure_pairs(options.pairs),
        "memory": {side: in_child(side, ROWS, ragged=True) for side in SIDES},
        "sizes": [in_child("ours", size // POSITIONS, ragged=False) for size in SIZES],
    }
    print_tables(result)
    write_result(result, options.out)


if __name__ == "__main__":
    main()
