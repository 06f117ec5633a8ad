"""Entries of verl's file logger: one line ``{"step": int, "data": {name: number}}`` each, and the names in them.

The logger writes NaN and infinity as null: null is NaN here, a metric that was there and was no finite number.
"""

from __future__ import annotations

import json
import math
from typing import Any

try:  # verl's logger writes with it, so it is there where verl is; five times as fast as json
    from orjson import loads as _strict
except ImportError:
    from json import loads as _strict

REWARD = "critic/score/mean"
ENTROPY = "actor/entropy"
GRAD_NORM = "actor/grad_norm"
LOSS_SCALE = "actor/loss_scale"
SKIPPED = "actor/skipped_steps"
SKIPPED_TOTAL = "actor/skipped_total"
CONSECUTIVE_SKIPS = "actor/consecutive_skips"
ALARMS = "mismatch/alarms"
VERLS_GAP = "training/rollout_probs_diff_mean"
STEP_SECONDS = ("timing_s/step", "perf/time_per_step")

_LARGEST_STEP = 2**53


def parse_entry(line: str | bytes) -> tuple[int, dict[str, Any]] | None:
    """Step and data of one line; None for anything else, such as a line that is not fully written yet.

    NaN and Infinity, which are no JSON but what other loggers write, are read too.
    """
    try:
        entry = _strict(line)
    except ValueError:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # the latter for brackets without end
            return None
    except RecursionError:
        return None
    if not isinstance(entry, dict):
        return None
    step, data = entry.get("step"), entry.get("data")
    if type(step) is not int or not 0 <= step < _LARGEST_STEP or not isinstance(data, dict):
        return None
    return step, data


def as_number(value: Any) -> float | None:
    """A logged value as a float: null is nan, what is no number None."""
    if value is None:
        return math.nan
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return None
