"""Hooks on the metrics that verl's trainers log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_fp16 import plugin
from verl_fp16.mismatch.statistics import gap_metrics


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
