"""Settings of the watch on the training-inference gap: names, defaults, meaning and valid range. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from verl_fp16.findings import SettingsError

ON_ALARM = ("warn", "checkpoint", "stop")

FEWEST_STEPS = 10
"""The smallest ``alarm_window``: a median of the oldest and one of the newest steps, with some in between."""


@dataclass(frozen=True)
class MismatchSettings:
    """What is kept of the gap between training and rollout, and when it is an alarm.

    An ``alarm_`` setting that is None turns its rule off. The rules are in :mod:`verl_fp16.mismatch.alarm_rules`, and
    so is where each default comes from.

    Args:
        on_alarm: ``warn`` tells it, ``checkpoint`` also saves a checkpoint of the step, ``stop`` then ends the run.
        evidence_interval: every so many training steps evidence is written; 0 for alarms only. >= 0.
        evidence_tokens: the worst tokens in a file of evidence; >= 1.
        evidence_sequences: sequences in a file, at most; >= 1.
        evidence_keep: the newest folders of evidence that are kept, beside those of alarms; >= 1.
        alarm_prob_diff: |pi - mu| of a step's worst token, in (0, 1].
        alarm_k3_growth: factor between the oldest and the newest k3 of the window; > 1.
        alarm_k3_jump: factor between the newest k3 and that of the 20 steps before; > 1.
        alarm_window: training steps over which k3's growth is looked at, and after which a fault that lasts is told
            again; >= 10. It belongs to all rules and cannot be None.
        alarm_slope: |slope| of the sequences' log(pi / mu) over their length, nats per 1,000 tokens; > 0.
        alarm_nonfinite: tokens of a step whose log-probability is not finite; >= 1.
        alarm_run_tokens: a row with one token so many times in a row counts as stuck; >= 2.
        alarm_run_share: share of stuck rows in a step, in (0, 1]. None for either of the two turns the rule off.

    Raises:
        SettingsError: naming every field that is wrong.
    """

    on_alarm: str = "warn"
    evidence_interval: int = 100
    evidence_tokens: int = 200
    evidence_sequences: int = 16384
    evidence_keep: int = 20
    alarm_prob_diff: float | None = 0.9
    alarm_k3_growth: float | None = 10.0
    alarm_k3_jump: float | None = 2.5
    alarm_window: int = 100
    alarm_slope: float | None = 0.5
    alarm_nonfinite: int | None = 1
    alarm_run_tokens: int | None = 64
    alarm_run_share: float | None = 0.01

    def __post_init__(self) -> None:
        complaints = [f"mismatch.{name} {complaint}" for name, complaint in mismatch_complaints(vars(self))]
        if complaints:
            raise SettingsError("; ".join(complaints))


_COUNTS = {
    "evidence_interval": (0, "a number of training steps, or 0 for evidence on alarms only"),
    "evidence_tokens": (1, "a number of tokens, 1 or more"),
    "evidence_sequences": (1, "a number of sequences, 1 or more"),
    "evidence_keep": (1, "a number of folders, 1 or more"),
    "alarm_window": (FEWEST_STEPS, f"a number of training steps, {FEWEST_STEPS} or more"),
}
_ALARM_COUNTS = {
    "alarm_nonfinite": (1, "a number of tokens, 1 or more"),
    "alarm_run_tokens": (2, "a number of tokens, 2 or more"),
}
_OFF = "or null to turn the rule off"


def mismatch_complaints(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The wrong fields of a complete mapping of these settings, each with what it has to be."""
    if values["on_alarm"] not in ON_ALARM:
        yield "on_alarm", f"must be {' or '.join(ON_ALARM)}, got {values['on_alarm']!r}"
    for name, (least, meaning) in _COUNTS.items():
        if not _count(values[name], least):
            yield name, f"must be {meaning}, got {values[name]!r}"
    for name, (least, meaning) in _ALARM_COUNTS.items():
        if values[name] is not None and not _count(values[name], least):
            yield name, f"must be {meaning}, {_OFF}, got {values[name]!r}"
    for name in ("alarm_prob_diff", "alarm_run_share"):
        if values[name] is not None and not (_number(values[name]) and 0 < values[name] <= 1):
            yield name, f"must be above 0 and at most 1, {_OFF}, got {values[name]!r}"
    for name, above, unit in (
        ("alarm_k3_growth", 1, "factor"),
        ("alarm_k3_jump", 1, "factor"),
        ("alarm_slope", 0, "number of nats"),
    ):
        if values[name] is not None and not (_number(values[name]) and above < values[name] < math.inf):
            yield name, f"must be a finite {unit} above {above}, {_OFF}, got {values[name]!r}"


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
