"""What a report shows: its panels, which metric of a log each one takes, and what is best. Plain Python and numpy.

verl's trainers do not all log the same names, and a run without this package has none of ours: a panel takes the first
of its names that a run logs, and the report says where runs differ in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from verl_fp16.file_log import RESUMED_KEY
from verl_fp16.log_entries import (
    ALARMS,
    CONSECUTIVE_SKIPS,
    ENTROPY,
    GRAD_NORM,
    LOSS_SCALE,
    REWARD,
    SKIPPED,
    SKIPPED_TOTAL,
    STEP_SECONDS,
    VERLS_GAP,
)
from verl_fp16.run_report.reading import RunLog, Series

DTYPES = {"training": "mismatch/train_dtype/", "rollout": "mismatch/rollout_dtype/"}
VALIDATION = "validation"
"""The panel whose metric is a mean over data sources, and the name under which it is found."""

COUNTED = ",.0f"
"""The form of what is counted."""

_VALIDATION = re.compile(r"val-core/.*/(acc|reward)/mean@\d+")
_GROUPS_MOST_SOURCES = 64


@dataclass(frozen=True)
class Panel:
    """One quantity over the steps.

    Args:
        key: of it in JSON and in the pages.
        title: what it is.
        label: of its axis, with the unit.
        names: of metrics; the first one that a run logs is taken.
        better: which of two values is the better one; "" where that cannot be said. ``nearer 0``: the smaller size.
        axis: the scale of its axis.
        form: of its numbers, in :func:`format`'s language.
        smoothed: whether a running median is drawn over it.
    """

    key: str
    title: str
    label: str
    names: tuple[str, ...]
    better: Literal["larger", "smaller", "nearer 0", ""] = ""
    axis: Literal["linear", "log", "log2"] = "linear"
    form: str = "#.4g"
    smoothed: bool = True


def _gap(name: str) -> tuple[str, ...]:
    return f"mismatch/{name}", f"mismatch_first_update/{name}"


GROUPS: dict[str, tuple[Panel, ...]] = {
    "Learning": (
        Panel("reward", "Reward", "mean of the step's responses", (REWARD, "critic/rewards/mean"), "larger"),
        Panel("validation", "Validation accuracy", "mean over data sources", (VALIDATION,), "larger", smoothed=False),
        Panel("entropy", "Entropy of the policy", "nats per token", (ENTROPY, "actor/entropy_loss")),
        Panel("response_length", "Response length", "tokens, mean", ("response_length/mean",), form=",.1f"),
    ),
    "Gap between rollout and training": (
        Panel(
            "gap_mean",
            "Gap, mean |Δ log p|",
            "nats per token",
            _gap("log_prob_abs_diff_mean"),
            "smaller",
            "log",
            ".3e",
        ),
        Panel(
            "gap_p99",
            "Gap, 99% quantile of |Δ log p|",
            "nats per token",
            _gap("log_prob_abs_diff_p99"),
            "smaller",
            "log",
            ".3e",
        ),
        Panel("k3", "k3, an estimate of KL(μ‖π)", "nats per token", _gap("k3"), "smaller", "log", ".3e"),
        Panel(
            "slope",
            "Slope of log(π/μ) over the length",
            "nats per 1,000 tokens",
            _gap("slope_per_1k_tokens"),
            "nearer 0",
            form="#.3g",
        ),
        Panel(
            "prob_diff",
            "Gap, mean |π − μ|",
            "probability",
            (*_gap("prob_abs_diff_mean"), VERLS_GAP),
            "smaller",
            "log",
            ".3e",
        ),
    ),
    "Updates": (
        Panel(
            "loss_scale", "Loss scale", "factor, powers of 2", (LOSS_SCALE,), axis="log2", form=",.10g", smoothed=False
        ),
        Panel("skipped", "Skipped updates, in total", "mini-batches", (SKIPPED_TOTAL,), form=COUNTED, smoothed=False),
        Panel("grad_norm", "Gradient norm", "L2 norm before clipping", (GRAD_NORM,), axis="log"),
        Panel("step_time", "Time of a training step", "seconds", STEP_SECONDS, "smaller", form="#.4g"),
        Panel(
            "critic_loss_scale",
            "Loss scale of the critic",
            "factor, powers of 2",
            ("critic/loss_scale",),
            axis="log2",
            form=",.10g",
            smoothed=False,
        ),
        Panel(
            "critic_skipped",
            "Skipped updates of the critic, in total",
            "mini-batches",
            ("critic/skipped_total",),
            form=COUNTED,
            smoothed=False,
        ),
    ),
}
PANELS = tuple(panel for panels in GROUPS.values() for panel in panels)
_NAMES = {name for panel in PANELS for name in panel.names}
_NAMES |= {SKIPPED, "critic/skipped_steps", CONSECUTIVE_SKIPS, "critic/consecutive_skips", ALARMS, RESUMED_KEY}


def is_wanted() -> Callable[[str], bool]:
    """For one log: whether a metric is needed, by its name. Of data sources, the first 64."""
    sources = 0

    def wanted(name: str) -> bool:
        nonlocal sources
        if name in _NAMES or name.startswith(tuple(DTYPES.values())):
            return True
        if _VALIDATION.fullmatch(name):
            sources += 1
            return sources <= _GROUPS_MOST_SOURCES
        return False

    return wanted


@dataclass(frozen=True)
class Point:
    """A value and its step."""

    step: int
    value: float


@dataclass(frozen=True)
class Course:
    """What a run logged of a panel.

    Args:
        metric: the name that was taken.
        series: its steps and values.
    """

    panel: Panel
    metric: str
    series: Series

    @property
    def finite(self) -> Series:
        kept = np.isfinite(self.series.values)
        return Series(self.series.steps[kept], self.series.values[kept])

    def first(self) -> Point | None:
        return self._at(0)

    def last(self) -> Point | None:
        return self._at(-1)

    def best(self) -> Point | None:
        """The first step of the best finite value; None where no value is better than another."""
        values = self.finite.values
        if not self.panel.better or not len(values):
            return None
        goodness = {"larger": values, "smaller": -values, "nearer 0": -np.abs(values)}[self.panel.better]
        return self._at(int(np.argmax(goodness)))

    def _at(self, index: int) -> Point | None:
        steps, values = self.finite
        return Point(int(steps[index]), float(values[index])) if len(steps) else None


def courses(log: RunLog) -> dict[str, Course]:
    """Panel's key -> what the run logged of it, of those that it logged."""
    found = {}
    for panel in PANELS:
        for name in panel.names:
            metric, series = _validation(log) if name == VALIDATION else (name, log.series.get(name))
            if series is not None:
                found[panel.key] = Course(panel, metric, series)
                break
    return found


def _validation(log: RunLog) -> tuple[str, Series | None]:
    """Its name, and the plain mean over data sources at each step that has one; of accuracies where there are any."""
    for kind in ("acc", "reward"):
        parts = [
            series for name, series in log.series.items() if (match := _VALIDATION.fullmatch(name)) and match[1] == kind
        ]
        if parts:
            steps, at = np.unique(np.concatenate([part.steps for part in parts]), return_inverse=True)
            values = np.concatenate([part.values for part in parts])
            return f"val-core/*/{kind}/mean@N", Series(steps, np.bincount(at, values) / np.bincount(at))
    return "", None


def written(value: float, form: str) -> str:
    """A number as it is printed, in ASCII; what is not finite by its name."""
    return format(value, form) if math.isfinite(value) else str(value)


def typeset(text: str) -> str:
    """A number of :func:`written` as it is read on a page: 3.100e-04 is 3.100e−4."""
    return re.sub(r"e([+-])0*(\d+)$", lambda match: f"e{match[1].strip('+')}{match[2]}", text).replace("-", "−")
