"""Which stages a self-test runs, and how long they may take. Plain Python."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

DOCTOR, MODEL, ENGINE, RUN, GAP, THROUGHPUT = "doctor", "model", "engine", "run", "gap", "throughput"
DEVICE = "device"
"""Names the row of what is tested, which has no stage."""
CHOOSABLE = (DOCTOR, ENGINE, RUN, GAP, THROUGHPUT)
"""Those that --only takes; the model is made where a stage needs it."""

STEPS = 3
"""Of the short run."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: its name.
        seconds: what it takes with the small model, by device (gpu or cpu); for the time left.
        timeout_s: after which it is ended; a user's model gets three times as much.
    """

    name: str
    seconds: dict[str, float]
    timeout_s: float


_STAGES = {
    DOCTOR: Stage(DOCTOR, {"cpu": 40, "gpu": 45}, 600),
    MODEL: Stage(MODEL, {"cpu": 25, "gpu": 25}, 240),
    # Longer than its ranks may take in both strategies, so that one that hangs costs no other one's facts.
    ENGINE: Stage(ENGINE, {"cpu": 60, "gpu": 80}, 780),
    RUN: Stage(RUN, {"cpu": 110, "gpu": 170}, 900),
    GAP: Stage(GAP, {"cpu": 150, "gpu": 200}, 900),
}


def stages(only: Collection[str]) -> list[Stage]:
    """Those that have a process, in order. ``only``: those that were asked for; all where it is empty."""
    wanted = set(only) or set(CHOOSABLE)
    if THROUGHPUT in wanted:  # it is judged by what the gap's stage timed
        wanted.add(GAP)
    if wanted - {DOCTOR, THROUGHPUT}:
        wanted.add(MODEL)
    return [stage for name, stage in _STAGES.items() if name in wanted]
