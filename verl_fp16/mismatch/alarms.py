"""When the gap between training and rollout is an alarm. Plain Python.

:class:`Alarms` is asked once a training step. What is an alarm, and where the defaults come from, is in
:mod:`verl_fp16.mismatch.alarm_rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from verl_fp16.mismatch.alarm_rules import RULES, Alarm, Logged
from verl_fp16.mismatch_settings import MismatchSettings

__all__ = ["QUIET_STEPS", "Alarm", "Alarms"]

QUIET_STEPS = 10
"""A rule that has fired is armed again after so many steps in a row in which its fault was gone."""


@dataclass
class _Told:
    """A fault that was told: in which step, and for how many steps it has been gone."""

    step: int
    quiet: int = 0


class Alarms:
    """Judges one run's training steps, one after the other; what it remembers is bounded by ``alarm_window``.

    A fault is told when its rule first holds. While it lasts, it is told again ``alarm_window`` steps later at the
    earliest; after :data:`QUIET_STEPS` steps in a row without it, at once when it comes back. Steps that do not log the
    metrics of a rule do not count for it. A resumed run begins anew.

    Attributes:
        holding: faults that the newest step has, told or not.
    """

    def __init__(self, settings: MismatchSettings) -> None:
        self._rules = [
            rule(settings) for rule, needed in RULES if all(getattr(settings, name) is not None for name in needed)
        ]
        self._again = settings.alarm_window
        self._told: dict[str, _Told] = {}
        self.holding = 0

    def judge(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms of a training step that are to be told.

        Args:
            step: its number; each step once, in order.
            metrics: what it logs; other metrics than those of the gap are passed over.
        """
        logged = Logged(metrics)
        verdicts = [verdict for rule in self._rules for verdict in rule.judge(step, logged)]
        self.holding = sum(alarm is not None for _, alarm in verdicts)
        return [alarm for fault, alarm in verdicts if self._is_news(fault, step, alarm is not None) and alarm]

    def _is_news(self, fault: str, step: int, holds: bool) -> bool:
        told = self._told.get(fault)
        if not holds:
            if told:
                told.quiet += 1
                if told.quiet >= QUIET_STEPS:
                    del self._told[fault]
            return False
        if told and step - told.step < self._again:
            told.quiet = 0
            return False
        self._told[fault] = _Told(step)
        return True
