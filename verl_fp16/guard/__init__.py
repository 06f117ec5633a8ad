"""The resolved configuration in, every contradiction to the declared precision out. Imports no verl, torch or vLLM.

One module for each concern. A rule is a function of a :class:`~verl_fp16.guard.case.Case` that yields findings. What
a rule says of verl was read in the sources of the releases in :data:`verl_fp16.releases.SUPPORTED_VERL`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_fp16.findings import Finding
from verl_fp16.guard import algorithm, coverage, engines, model, optimizer, roles, rollout, silent, weight_sync
from verl_fp16.guard.case import Case, Rule
from verl_fp16.settings import Settings

RULES: tuple[Rule, ...] = (
    *roles.RULES,
    *engines.RULES,
    *optimizer.RULES,
    *rollout.RULES,
    *weight_sync.RULES,
    *model.RULES,
    *algorithm.RULES,
    *silent.RULES,
    *coverage.RULES,
)


def check(config: Mapping[str, Any], settings: Settings | None, *, verl: str, entry: str = "") -> list[Finding]:
    """Hold a configuration against the precision it declares.

    Args:
        config: the configuration as a plain mapping, interpolations resolved; without what could not be resolved.
        settings: the node ``verl_fp16``; None where it is wrong, which the caller tells.
        verl: verl's release.
        entry: the module that was started, as ``verl.trainer.main_ppo``.
    """
    case = Case(config, settings, verl, entry)
    return [finding for rule in RULES for finding in rule(case)]
