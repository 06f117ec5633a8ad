"""Hooks on the metrics that verl's trainers log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_fp16 import plugin
from verl_fp16.mismatch.statistics import gap_metrics

# How a training step of several calls of the worker (separate_async) comes to one value. verl sums what has "total" in
# its name, and averages the rest.
_COUNTED = ("applied_steps", "skipped_steps", "skipped_forward_steps")
_AS_IT_IS = ("loss_scale", "skipped_total", "consecutive_skips")


def add_up_skips(original: Callable[[Any], dict[str, list[str]]]) -> Callable[[Any], dict[str, list[str]]]:
    def _init_aggregation_rules(self: Any) -> dict[str, list[str]]:
        rules = original(self)
        if plugin.flag_given:
            for rule, names in (("sum", _COUNTED), ("last", _AS_IT_IS)):
                ours = [f"{role}/{name}" for role in ("actor", "critic") for name in names]
                rules[rule] = [*rules.get(rule, ()), *ours]
        return rules

    return _init_aggregation_rules


def add_log_prob_gap(original: Callable[[Any], dict]) -> Callable[[Any], dict]:
    def calculate_debug_metrics(data: Any) -> dict:
        metrics = original(data)
        if plugin.flag_given:
            batch = data.batch
            mask = batch["response_mask"] if "response_mask" in batch else batch["attention_mask"]
            mask = mask[:, -batch["responses"].size(1) :]
            metrics.update(gap_metrics(batch["rollout_log_probs"], batch["old_log_probs"], mask))
        return metrics

    return calculate_debug_metrics
