"""One run, with all that a report says of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from verl_fp16.log_entries import SKIPPED_TOTAL, STEP_SECONDS
from verl_fp16.run_report.curves import DTYPES, Course, courses, is_wanted
from verl_fp16.run_report.evidence import Evidence, gather
from verl_fp16.run_report.findings import Finding, judge
from verl_fp16.run_report.places import Place, RunError
from verl_fp16.run_report.reading import PassedOver, RunLog, read_log

_LONGEST_STEP = 1e9
"""Seconds; what is larger is no time."""


@dataclass(frozen=True)
class Run:
    """A run that was read.

    Args:
        place: its name and where it is.
        log: what its log has.
        courses: panel's key -> what it logged of that.
        evidence: what lay beside its log.
        findings: where it went wrong, by step.
    """

    place: Place
    log: RunLog
    courses: Mapping[str, Course]
    evidence: Evidence
    findings: tuple[Finding, ...]

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last step that has an entry."""
        return int(self.log.steps[0]), int(self.log.steps[-1])

    @property
    def seconds(self) -> float | None:
        """What its training steps took together, as logged; without what lies between them, such as a start."""
        for name in STEP_SECONDS:
            if name in self.log.series:
                values = self.log.series[name].values
                return float(values[np.isfinite(values) & (values < _LONGEST_STEP)].sum())
        return None

    @property
    def dtypes(self) -> dict[str, str]:
        """Side -> the dtypes that were read back of it, as logged with the gap."""
        found = {}
        for side, prefix in DTYPES.items():
            names = sorted(name.removeprefix(prefix) for name in self.log.series if name.startswith(prefix))
            if names:
                found[side] = "/".join(names)
        return found

    @property
    def skips(self) -> dict[str, int]:
        """Role -> the updates that were skipped since the start, as logged."""
        found = {}
        for role in ("actor", "critic"):
            series = self.log.series.get(SKIPPED_TOTAL.replace("actor", role))
            if series is not None and math.isfinite(series.values[-1]):
                found[role] = int(series.values[-1])
        return found

    @property
    def notes(self) -> list[str]:
        """What was passed over in its log, and what was not found beside it."""
        return [*_passed_over(self.log.passed_over), *self.evidence.notes]


def load(place: Place, advance: Callable[[int], object] | None = None) -> Run:
    """Read a run.

    Args:
        advance: as of :func:`read_log`.

    Raises:
        RunError: its log cannot be read, or has no entry.
    """
    try:
        log = read_log(place.log, is_wanted(), advance)
    except OSError as error:
        raise RunError(f"{place.log}: it cannot be read ({error.strerror})") from None
    if not len(log.steps):
        passed = log.passed_over
        lines = passed.broken + passed.half_written + passed.too_long
        what = (
            "none of its lines is an entry of verl's file logger"
            if lines
            else "the file is empty, no step was logged yet"
        )
        raise RunError(f"{place.log}: {what}. Name another log, a .jsonl with lines {{'step': ..., 'data': ...}}")
    shown = courses(log)
    evidence = gather(place, log)
    return Run(place, log, shown, evidence, tuple(judge(log, shown, evidence)))


def _passed_over(counts: PassedOver) -> list[str]:
    told = (
        (counts.broken, "line that is no entry of the logger", "lines that are no entries of the logger", "left out"),
        (counts.too_long, "line too long for an entry", "lines too long for an entry", "left out"),
        (counts.texts, "value that is no number", "values that are no numbers", "left out"),
        (counts.undone, "entry", "entries", "left out: of steps past the one from which the run was taken up again"),
        (counts.again, "entry", "entries", "of earlier steps than the one before: of a step, the last value counts"),
    )
    notes = [f"{number:,} {one if number == 1 else more} {what}" for number, one, more, what in told if number]
    return notes + ["the last line is half-written and was left out"] * counts.half_written
