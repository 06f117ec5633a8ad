"""Every setting of ours: its name, default, meaning and valid range. Knows no verl.

The YAML under ``verl_fp16/conf`` repeats the defaults for the reader; a test holds the two equal.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from verl_fp16.fault_injection import Fault, fault_complaints
from verl_fp16.findings import Finding, SettingsError, written
from verl_fp16.loss_scale_settings import LossScaleSettings, scale_complaints
from verl_fp16.mismatch_settings import MismatchSettings, mismatch_complaints
from verl_fp16.weight_sync_settings import WeightSyncSettings, sync_complaints

__all__ = [
    "DTYPES",
    "SCALES",
    "LossScaleSettings",
    "MismatchSettings",
    "Settings",
    "SettingsError",
    "WeightSyncSettings",
]

DTYPES = ("float16", "bfloat16", "float32")
SCALES = ("loss_scale", "critic_loss_scale")


@dataclass(frozen=True)
class Settings:
    """The node ``verl_fp16:`` of the configuration.

    Args:
        train_dtype: compute dtype of actor, reference policy and critic: autocast and FSDP parameters.
        rollout_dtype: dtype of vLLM's model.
        loss_scale: the actor's loss scaler; read when ``train_dtype`` is float16.
        critic_loss_scale: the critic's; follows ``loss_scale`` where it is not set.
        sync: how the actor's weights come into the rollout.
        mismatch: what is kept of the gap between training and rollout, and when it is an alarm.
        read_back_timeout_s: seconds in which every process has to say what it runs, before the first rollout; > 0.
        fault_injection: faults planted on purpose, for tests and drills; see :mod:`verl_fp16.fault_injection`.
    """

    train_dtype: str = "float16"
    rollout_dtype: str = "float16"
    loss_scale: LossScaleSettings = field(default_factory=LossScaleSettings)
    critic_loss_scale: LossScaleSettings = field(default_factory=LossScaleSettings)
    sync: WeightSyncSettings = field(default_factory=WeightSyncSettings)
    mismatch: MismatchSettings = field(default_factory=MismatchSettings)
    read_back_timeout_s: float = 300.0
    fault_injection: tuple[Fault, ...] = ()

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
        faults = tuple(Fault(**fault) for fault in node.get("fault_injection", ()))
        parts = {
            "sync": WeightSyncSettings(**node.get("sync", {})),
            "mismatch": MismatchSettings(**node.get("mismatch", {})),
        }
        return cls(**{**node, **scales, **parts, "fault_injection": faults})


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
    yield from _section_problems(node.get("sync", {}), f"{key}.sync", WeightSyncSettings, sync_complaints)
    yield from _section_problems(node.get("mismatch", {}), f"{key}.mismatch", MismatchSettings, mismatch_complaints)
    for place, value, complaint in fault_complaints(node.get("fault_injection", ())):
        where = f"{key}.fault_injection{place}"
        yield Finding("error", where, value, complaint, ("verl_fp16.fault_injection=[]",))
    told = set()
    for name in SCALES:
        for finding in _section_problems(node.get(name, {}), f"{key}.{name}", LossScaleSettings, scale_complaints):
            # The critic's follow the actor's: what is said of the one needs no repetition for the other.
            said = finding.key.rpartition(".")[2], repr(finding.value), finding.why
            if name == SCALES[0] or said not in told:
                yield finding
            told.add(said)


def _seconds_complaint(value: Any) -> str:
    if not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < math.inf:
        return ""
    return f"must be a finite number of seconds above 0, got {value!r}"


def _section_problems(
    values: Any, key: str, kind: type, complaints: Callable[[Mapping[str, Any]], Iterable[tuple[str, str]]]
) -> Iterator[Finding]:
    """What is wrong with the settings of one part, of the dataclass ``kind``."""
    if not isinstance(values, Mapping):
        yield _not_a_mapping(values, key)
        return
    yield from _unknown_keys(values, kind, key)
    defaults = {f.name: f.default for f in fields(kind)}
    given = {**defaults, **{name: value for name, value in values.items() if name in defaults}}
    for name, complaint in complaints(given):
        fix = (_default(key, kind, name),)
        # The default may lie outside of the bounds that are complained of too.
        fix += tuple(_default(key, kind, bound) for bound in ("min", "max") if f"loss_scale.{bound}" in complaint)
        yield Finding("error", f"{key}.{name}", given[name], complaint, fix)


def _default(key: str, kind: type, name: str) -> str:
    return f"{key}.{name}={written(getattr(kind, name))}"


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
