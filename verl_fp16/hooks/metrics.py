"""Hooks on how verl's trainers come to one value of a metric for a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_fp16 import plugin
from verl_fp16.hooks.bypass import FIRST_MINI_BATCH

# How a training step of several calls of the worker (separate_async) comes to one value. verl sums what has "total" in
# its name, and averages the rest.
_COUNTED = ("applied_steps", "skipped_steps", "skipped_forward_steps")
_COUNTED_TOKENS = ("tokens", "sequences", "empty_rows", "nonfinite_rollout", "nonfinite_training")
_AS_IT_IS = ("loss_scale", "skipped_total", "consecutive_skips")


def add_up_skips(original: Callable[[Any], dict[str, list[str]]]) -> Callable[[Any], dict[str, list[str]]]:
    def _init_aggregation_rules(self: Any) -> dict[str, list[str]]:
        rules = original(self)
        if plugin.flag_given:
            for rule, names in (("sum", _COUNTED), ("last", _AS_IT_IS)):
                ours = [f"{role}/{name}" for role in ("actor", "critic") for name in names]
                rules[rule] = [*rules.get(rule, ()), *ours]
            rules["sum"] += [f"actor/{FIRST_MINI_BATCH}{name}" for name in _COUNTED_TOKENS]
            rules["sum"].append("actor/mismatch/nonfinite_rollout")
        return rules

    return _init_aggregation_rules
