"""Where a run went wrong. Each kind of finding has its definition here, in one function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from verl_fp16.log_entries import ALARMS, CONSECUTIVE_SKIPS, SKIPPED
from verl_fp16.run_report.curves import PANELS, Course
from verl_fp16.run_report.evidence import Evidence, tokens_command
from verl_fp16.run_report.reading import RunLog, Series

COLLAPSE_STEPS = 20
"""Steps of the reward's running mean."""

COLLAPSE_SHARE = 0.5

COLLAPSE_ERRORS = 8.0
"""Standard errors that the fall has to have; that many, as the highest of many means is compared with the others."""

MANY_SKIPS = 8
"""Skips in a row at the end of a log that are worth telling: the loss scale fell to a 256th of what it was."""


class Finding(NamedTuple):
    """Something that went wrong.

    Attributes:
        step: in which it began.
        kind: ``alarm``, ``not finite``, ``reward``, ``skips`` or ``ended``.
        text: what, as a sentence without its beginning and end.
        advice: what to do; "" where the text says it all.
        command: that shows more, to be copied; "" where there is none.
    """

    step: int
    kind: str
    text: str
    advice: str = ""
    command: str = ""


LOOKED_FOR = (
    "alarms on the gap, values that are not finite, a collapse of the reward, updates skipped in a row at the end, a "
    "log that ends early"
)
"""The kinds of findings, in words."""


def judge(log: RunLog, courses: Mapping[str, Course], evidence: Evidence) -> list[Finding]:
    """All findings of a run, by step."""
    found = [
        *_alarms(log, evidence),
        *_not_finite(log, courses),
        *_collapse(courses),
        *_skips(log, evidence),
        *_end(log, evidence),
    ]
    return sorted(found, key=lambda finding: finding.step)


def _alarms(log: RunLog, evidence: Evidence) -> Iterator[Finding]:
    """The first alarm of each rule, from the evidence; where it has none, the first step with one in force."""
    told: dict[str, list[int]] = {}
    for alarm in evidence.alarms:
        told.setdefault(alarm.rule or alarm.text, []).append(alarm.step)
    for alarm in evidence.alarms:
        steps = told.pop(alarm.rule or alarm.text, None)
        if steps:
            times = f"{len(steps) - 1} times, last" if len(steps) > 2 else "once,"
            again = f"; told again {times} at step {steps[-1]:,}" if len(steps) > 1 else ""
            command = tokens_command(alarm.folder)
            yield Finding(alarm.step, "alarm", f"alarm: {alarm.text}{again}", alarm.advice, command)
    series = log.series.get(ALARMS)
    if series is not None and not evidence.alarms:
        steps = series.steps[series.values > 0]
        if len(steps):
            yield Finding(
                int(steps[0]),
                "alarm",
                f"an alarm on the gap was in force from this step on, in {len(steps):,} "
                f"step{'s'[: len(steps) > 1]}, last at step {steps[-1]:,}",
                "which one is in the driver's log, in lines with `verl_fp16.mismatch.alarm_`",
            )


def _not_finite(log: RunLog, courses: Mapping[str, Course]) -> Iterator[Finding]:
    """The first value of a panel's metric that is no finite number, and of a gradient norm in a step without a skip."""
    for panel in PANELS:
        if panel.key not in courses:
            continue
        series = courses[panel.key].series
        steps = series.steps[~np.isfinite(series.values)]
        advice = "look at the driver's log of that step; in the file log such a value is null"
        if panel.key == "grad_norm":
            steps = np.setdiff1d(steps, _skipping(log))
            advice = "no update was skipped in it: without a loss scaler, the weights of this step are not finite"
        if len(steps):
            more = f", and in {len(steps) - 1:,} later step{'s'[: len(steps) > 2]}" if len(steps) > 1 else ""
            yield Finding(
                int(steps[0]),
                "not finite",
                f"{panel.title} ({courses[panel.key].metric}) is not a finite number{more}",
                advice,
            )


def _skipping(log: RunLog) -> np.ndarray:
    """Steps with a skipped update."""
    series = log.series.get(SKIPPED)
    return np.empty(0, np.int64) if series is None else series.steps[series.values > 0]


def _collapse(courses: Mapping[str, Course]) -> Iterator[Finding]:
    """The reward has collapsed: its mean over 20 steps is below half of the best such mean before.

    Judged where that best is positive and the difference more than eight standard errors of the two means, from how
    the reward varied within their steps.
    """
    if "reward" not in courses:
        return
    steps, values = courses["reward"].finite
    if len(values) < 2 * COLLAPSE_STEPS:
        return
    means, squared_errors = _running_means(values)
    means = np.where(np.isfinite(means), means, 0.0)
    best_at = np.maximum.accumulate(np.where(means >= np.maximum.accumulate(means), np.arange(len(means)), 0))
    best = means[best_at]
    error = np.sqrt(squared_errors + squared_errors[best_at])
    fallen = (best > 0) & (means < COLLAPSE_SHARE * best) & (best - means > COLLAPSE_ERRORS * error)
    if not fallen.any():
        return
    at = int(np.argmax(fallen))
    ends = steps[COLLAPSE_STEPS - 1 :]
    back = means[-1] >= COLLAPSE_SHARE * best[at]
    yield Finding(
        int(ends[at]),
        "reward",
        f"the reward collapsed: its mean over {COLLAPSE_STEPS} steps is {means[at]:.3g}, below half of the best one, "
        f"{best[at]:.3g} at step {ends[best_at[at]]:,}; at the end it is {means[-1]:.3g}"
        f"{', above that half again' if back else ''}",
        "look at the gap and the alarms of the steps before; resume from a checkpoint before the fall",
    )


def _running_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of each 20 values in a row, and the squares of their standard errors; of shape (n - 19,)."""
    windows = np.lib.stride_tricks.sliding_window_view(values, COLLAPSE_STEPS)
    with np.errstate(over="ignore", invalid="ignore"):  # of rewards near the end of float64
        return windows.mean(axis=1), windows.var(axis=1, ddof=1) / COLLAPSE_STEPS


def _skips(log: RunLog, evidence: Evidence) -> Iterator[Finding]:
    """Updates were skipped in a row to the end of the log, :data:`MANY_SKIPS` or more."""
    for role in ("actor", "critic"):
        series: Series | None = log.series.get(CONSECUTIVE_SKIPS.replace("actor", role))
        if series is None or not series.values[-1] >= MANY_SKIPS:
            continue
        newest = next((f": {skip.newest}" for skip in evidence.skips if skip.role == role), "")
        yield Finding(
            int(series.steps[-1]),
            "skips",
            f"at the end {series.values[-1]:,.0f} updates of the {role} in a row were skipped{newest}",
            "see `Reading a skip` in docs/loss-scale.md",
        )


def _end(log: RunLog, evidence: Evidence) -> Iterator[Finding]:
    """The log ends before the steps that the run's configuration names, or in the middle of a line."""
    last = int(log.steps[-1])
    half = ", in the middle of a line" if log.passed_over.half_written else ""
    if evidence.planned is not None and last < evidence.planned:
        yield Finding(
            last,
            "ended",
            f"the log ends at step {last:,} of {evidence.planned:,}{half}: the run still goes on, was stopped, or died",
            "see the end of the driver's log",
        )
    elif half:
        yield Finding(
            last, "ended", f"the log ends{half}, after step {last:,}: the run still goes on, or was killed then"
        )
