"""Settings of the loss scaler: names, defaults, meaning and valid range. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from verl_fp16.findings import SettingsError

MODES = ("dynamic", "static")

# Why an update is skipped: the gradients overflowed under the scale, which backing off cures; the loss or an output of
# the forward pass is not finite, or the norm of finite gradients is not, which it does not.
GRADIENT, FORWARD, NORM = "gradient", "forward", "norm"

# Both the scale and its reciprocal have to be ordinary float32 numbers.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-100, 2.0**100

# What moves the scale, and is read in the mode dynamic only.
DYNAMIC_FIELDS = ("growth_factor", "backoff_factor", "growth_interval", "min", "max")
_NUMBERS = ("init", "growth_factor", "backoff_factor", "min", "max")
_COUNTS = ("growth_interval", "max_consecutive_skips")
_SWITCHES = ("hold_lr_on_skip", "trace_modules")


@dataclass(frozen=True)
class LossScaleSettings:
    """Loss scaling (Micikevicius et al., 2018, section 3.2). Defaults: the paper's patch, which has no ceiling.

    Args:
        init: first scale. Lower it for runs of a few hundred updates: each halving costs one skipped update.
        growth_factor: the scale is multiplied by it after ``growth_interval`` updates in a row without overflow; > 1.
        backoff_factor: the scale is multiplied by it after an overflow; between 0 and 1.
        growth_interval: updates in a row without overflow before the scale grows; >= 1.
        min: the scale never falls below it; > 0.
        max: the scale never rises above it; None for 2^100.
        mode: dynamic; or static, in which the scale stays at ``init`` and an overflow only skips the update.
        max_consecutive_skips: the run stops after so many skipped updates in a row, where the scale is at ``min`` or
            lowering it is no cure; >= 1. The default leaves the way down from 65536 to 1 and as much again.
        hold_lr_on_skip: whether a training step without any applied update leaves the learning rate's schedule alone.
        trace_modules: whether every forward pass in training looks for the first module whose output is not finite;
            otherwise only the one after a forward pass that was not finite does.

    ``init``, ``min`` and ``max`` lie between 2^-100 and 2^100, so that the scale and its reciprocal are ordinary in
    float32.

    Raises:
        SettingsError: naming every field that is wrong.
    """

    init: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 400
    min: float = 1.0
    max: float | None = None
    mode: str = "dynamic"
    max_consecutive_skips: int = 32
    hold_lr_on_skip: bool = True
    trace_modules: bool = False

    def __post_init__(self) -> None:
        complaints = [f"loss_scale.{name} {complaint}" for name, complaint in scale_complaints(vars(self))]
        if complaints:
            raise SettingsError("; ".join(complaints))

    @property
    def ceiling(self) -> float:
        """The largest scale: ``max``, or 2^100."""
        return LARGEST_SCALE if self.max is None else self.max


def scale_complaints(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The wrong fields of a complete mapping of a loss scaler's settings, each with what it has to be."""
    found = dict(_wrong_types(values))
    yield from found.items()
    for name, complaint in _out_of_range(values, found.keys()):
        if name not in found:
            yield name, complaint


def _wrong_types(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in _NUMBERS:
        value = values[name]
        if name == "max" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            yield name, f"must be a finite number{' or null' if name == 'max' else ''}, got {value!r}"
    for name in _COUNTS:
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int):
            yield name, f"must be an integer without point or exponent, got {value!r}"
    for name in _SWITCHES:
        if not isinstance(values[name], bool):
            yield name, f"must be true or false, got {values[name]!r}"
    if values["mode"] not in MODES:
        yield "mode", f"must be {' or '.join(MODES)}, got {values['mode']!r}"


def _out_of_range(values: Mapping[str, Any], wrong: Any) -> Iterator[tuple[str, str]]:
    """The fields whose value is impossible; ``wrong`` are those that cannot be compared with."""
    init, growth, backoff = values["init"], values["growth_factor"], values["backoff_factor"]
    smallest, largest = values["min"], values["max"]
    for name in _COUNTS:
        if name not in wrong and values[name] < 1:
            yield name, f"must be at least 1, got {values[name]}"
    if "growth_factor" not in wrong and not growth > 1:
        yield "growth_factor", f"must be above 1, got {growth}"
    elif "growth_factor" not in wrong and growth > LARGEST_SCALE:
        yield "growth_factor", f"must be at most {LARGEST_SCALE:g}, or the scale could never grow, got {growth}"
    if "backoff_factor" not in wrong and not 0 < backoff < 1:
        yield "backoff_factor", f"must lie between 0 and 1, got {backoff}"
    for name in ("init", "min", "max"):
        if name in wrong or values[name] is None:
            continue
        if values[name] < SMALLEST_SCALE:
            yield name, f"must be at least {SMALLEST_SCALE:g}, got {values[name]}"
        elif values[name] > LARGEST_SCALE:
            yield name, f"must be at most {LARGEST_SCALE:g}, got {values[name]}"
    if values["mode"] != "dynamic" or wrong & {"init", "min", "max"}:
        return
    if init < smallest:
        yield "init", f"must be at least loss_scale.min ({smallest}), got {init}"
    if largest is not None and largest < smallest:
        yield "max", f"must be at least loss_scale.min ({smallest}), got {largest}"
    elif largest is not None and init > largest:
        yield "init", f"must be at most loss_scale.max ({largest}), got {init}"
