"""Every setting of ours: its name, default, meaning and valid range. Knows no verl.

The YAML under ``verl_fp16/conf`` repeats the defaults for the reader; a test holds the two equal.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from verl_fp16.findings import Finding

DTYPES = ("float16", "bfloat16", "float32")

# Both the scale and its reciprocal have to be ordinary float32 numbers.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-100, 2.0**100


class SettingsError(ValueError):
    """Settings are unknown, of the wrong type or out of range; the message names every key and the fix."""

    def __init__(self, message: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings


@dataclass(frozen=True)
class LossScaleSettings:
    """Dynamic loss scaling (Micikevicius et al., 2018, section 3.2). Defaults: the paper's patch.

    Args:
        init: first scale. Lower it for runs of a few hundred updates: each halving costs one skipped update.
        growth_factor: the scale is multiplied by it after ``growth_interval`` updates in a row without overflow; > 1.
        backoff_factor: the scale is multiplied by it after an overflow; between 0 and 1.
        growth_interval: updates in a row without overflow before the scale grows; >= 1.
        min: the scale never falls below it; > 0.

    ``init`` and ``min`` lie between 2^-100 and 2^100, so that the scale and its reciprocal are ordinary in float32.

    Raises:
        SettingsError: naming every field that is wrong.
    """

    init: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 400
    min: float = 1.0

    def __post_init__(self) -> None:
        complaints = [f"loss_scale.{name} {complaint}" for name, complaint in _scale_complaints(vars(self))]
        if complaints:
            raise SettingsError("; ".join(complaints))


def _scale_complaints(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The wrong fields of a complete mapping of a loss scaler's settings, each with what it has to be."""
    wrong = set()
    for name in ("init", "growth_factor", "backoff_factor", "min"):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            wrong.add(name)
            yield name, f"must be a finite number, got {value!r}"
    init, growth, backoff = values["init"], values["growth_factor"], values["backoff_factor"]
    interval, smallest = values["growth_interval"], values["min"]
    if isinstance(interval, bool) or not isinstance(interval, int):
        yield "growth_interval", f"must be an integer without point or exponent, got {interval!r}"
    elif interval < 1:
        yield "growth_interval", f"must be at least 1, got {interval}"
    if "growth_factor" not in wrong and not growth > 1:
        yield "growth_factor", f"must be above 1, got {growth}"
    elif "growth_factor" not in wrong and growth > LARGEST_SCALE:
        yield "growth_factor", f"must be at most {LARGEST_SCALE:g}, or the scale could never grow, got {growth}"
    if "backoff_factor" not in wrong and not 0 < backoff < 1:
        yield "backoff_factor", f"must lie between 0 and 1, got {backoff}"
    if "min" not in wrong and not smallest >= SMALLEST_SCALE:
        yield "min", f"must be at least {SMALLEST_SCALE:g}, got {smallest}"
    if "init" not in wrong and init > LARGEST_SCALE:
        yield "init", f"must be at most {LARGEST_SCALE:g}, got {init}"
    elif not wrong & {"init", "min"} and not init >= smallest:
        yield "init", f"must be at least loss_scale.min ({smallest}), got {init}"


@dataclass(frozen=True)
class Settings:
    """The node ``verl_fp16:`` of the configuration.

    Args:
        train_dtype: compute dtype of actor, reference policy and critic: autocast and FSDP parameters.
        rollout_dtype: dtype of vLLM's model.
        loss_scale: the actor's loss scaler; read when ``train_dtype`` is float16.
        critic_loss_scale: the critic's; follows ``loss_scale`` where it is not set.
        read_back_timeout_s: seconds in which every process has to say what it runs, before the first rollout; > 0.
    """

    train_dtype: str = "float16"
    rollout_dtype: str = "float16"
    loss_scale: LossScaleSettings = field(default_factory=LossScaleSettings)
    critic_loss_scale: LossScaleSettings = field(default_factory=LossScaleSettings)
    read_back_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("train_dtype", "rollout_dtype"):
            if getattr(self, name) not in DTYPES:
                raise SettingsError(f"{name} must be one of {', '.join(DTYPES)}, got {getattr(self, name)!r}")
        if complaint := _seconds_complaint(self.read_back_timeout_s):
            raise SettingsError(f"read_back_timeout_s {complaint}")

    @classmethod
    def from_node(cls, node: Mapping[str, Any]) -> Settings:
        """Build from the resolved node ``verl_fp16:``.

        Raises:
            SettingsError: listing every unknown key (with the nearest right one) and every invalid value.
        """
        found = tuple(_problems(node))
        if found:
            raise SettingsError("; ".join(f"{finding.key} {finding.why}" for finding in found), found)
        actor, critic = (dict(node.get(name, {})) for name in SCALES)
        scales = {
            "loss_scale": LossScaleSettings(**actor),
            "critic_loss_scale": LossScaleSettings(**{**actor, **critic}),
        }
        return cls(**{**node, **scales})


SCALES = ("loss_scale", "critic_loss_scale")


def _problems(node: Any, key: str = "verl_fp16") -> Iterator[Finding]:
    if not isinstance(node, Mapping):
        yield _not_a_mapping(node, key)
        return
    yield from _unknown_keys(node, Settings, key)
    for name in ("train_dtype", "rollout_dtype"):
        value = node.get(name, DTYPES[0])
        if value not in DTYPES:
            why = f"must be one of {', '.join(DTYPES)}, got {value!r}"
            yield Finding("error", f"{key}.{name}", value, why, advice="use one of the groups precision=...")
    seconds = node.get("read_back_timeout_s", Settings.read_back_timeout_s)
    if complaint := _seconds_complaint(seconds):
        fix = (f"{key}.read_back_timeout_s={Settings.read_back_timeout_s:g}",)
        yield Finding("error", f"{key}.read_back_timeout_s", seconds, complaint, fix)
    told = set()
    for name in SCALES:
        for finding in _scale_problems(node.get(name, {}), f"{key}.{name}"):
            # The critic's follow the actor's: what is said of the one needs no repetition for the other.
            said = finding.key.rpartition(".")[2], repr(finding.value), finding.why
            if name == SCALES[0] or said not in told:
                yield finding
            told.add(said)


def _seconds_complaint(value: Any) -> str:
    if not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < math.inf:
        return ""
    return f"must be a finite number of seconds above 0, got {value!r}"


def _scale_problems(values: Any, key: str) -> Iterator[Finding]:
    if not isinstance(values, Mapping):
        yield _not_a_mapping(values, key)
        return
    yield from _unknown_keys(values, LossScaleSettings, key)
    defaults = {f.name: f.default for f in fields(LossScaleSettings)}
    given = {**defaults, **{name: value for name, value in values.items() if name in defaults}}
    for name, complaint in _scale_complaints(given):
        fix = (f"{key}.{name}={defaults[name]}",)
        if name == "init" and "loss_scale.min" in complaint:  # the default of init may be below this min too
            fix += (f"{key}.min={defaults['min']}",)
        yield Finding("error", f"{key}.{name}", given[name], complaint, fix)


def _not_a_mapping(value: Any, key: str) -> Finding:
    return Finding(
        "error", key, value, f"must be a mapping, got {value!r}", advice=f"set single keys, as {key}.KEY=..."
    )


def _unknown_keys(values: Mapping[str, Any], kind: type, key: str) -> Iterator[Finding]:
    known = [f.name for f in fields(kind)]
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {key}.{near[0]}?" if near else f"known keys: {', '.join(known)}"
            yield Finding("error", f"{key}.{name}", value, f"is no setting: {hint}", (f"~{key}.{name}",))
