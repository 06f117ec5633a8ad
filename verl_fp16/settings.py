"""Every setting of ours: its name, default, meaning and valid range. Knows no verl.

The YAML under ``verl_fp16/conf`` repeats the defaults for the reader; a test holds the two equal.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

DTYPES = ("float16", "bfloat16", "float32")

# Both the scale and its reciprocal have to be ordinary float32 numbers.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-100, 2.0**100


class SettingsError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the message names the key and the fix."""


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
    """

    init: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 400
    min: float = 1.0

    def __post_init__(self) -> None:
        for name in ("init", "growth_factor", "backoff_factor", "min"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise SettingsError(f"loss_scale.{name} must be a finite number, got {value!r}")
        if isinstance(self.growth_interval, bool) or not isinstance(self.growth_interval, int):
            raise SettingsError(
                f"loss_scale.growth_interval must be an integer without point or exponent, got {self.growth_interval!r}"
            )
        if not self.min >= SMALLEST_SCALE:
            raise SettingsError(f"loss_scale.min must be at least {SMALLEST_SCALE:g}, got {self.min}")
        if self.init > LARGEST_SCALE:
            raise SettingsError(f"loss_scale.init must be at most {LARGEST_SCALE:g}, got {self.init}")
        if not self.init >= self.min:
            raise SettingsError(f"loss_scale.init must be at least loss_scale.min ({self.min}), got {self.init}")
        if not self.growth_factor > 1:
            raise SettingsError(f"loss_scale.growth_factor must be above 1, got {self.growth_factor}")
        if not 0 < self.backoff_factor < 1:
            raise SettingsError(f"loss_scale.backoff_factor must lie between 0 and 1, got {self.backoff_factor}")
        if self.growth_interval < 1:
            raise SettingsError(f"loss_scale.growth_interval must be at least 1, got {self.growth_interval}")


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
        timeout = self.read_back_timeout_s
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise SettingsError(f"read_back_timeout_s must be a finite number of seconds above 0, got {timeout!r}")

    @classmethod
    def from_node(cls, node: Mapping[str, Any]) -> Settings:
        """Build from the resolved node ``verl_fp16:``.

        Raises:
            SettingsError: an unknown key (the nearest right one is named) or an invalid value.
        """
        node = dict(node)
        scales = {
            name: _from_mapping(LossScaleSettings, node.pop(name), f"verl_fp16.{name}")
            for name in ("loss_scale", "critic_loss_scale")
            if name in node
        }
        return _from_mapping(cls, {**node, **scales}, "verl_fp16")


def _from_mapping(kind: type, values: Any, key: str) -> Any:
    if not isinstance(values, Mapping):
        raise SettingsError(f"{key} must be a mapping, got {values!r}")
    known = [f.name for f in fields(kind)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {key}.{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise SettingsError(f"unknown key {key}.{name}: {hint}")
    try:
        return kind(**values)
    except SettingsError as error:
        raise SettingsError(f"{key}.{str(error).removeprefix('loss_scale.')}") from None
