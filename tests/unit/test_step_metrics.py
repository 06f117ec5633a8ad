"""A training step of several calls of the worker, as verl's trainers aggregate it."""

from __future__ import annotations

import pytest

from verl_fp16 import plugin
from verl_fp16.hooks import metrics

CALLS = [  # five earlier skips; the second of four calls has one more
    {"loss_scale": 65536.0, "skipped_steps": 0.0, "applied_steps": 1.0, "skipped_total": 5.0, "consecutive_skips": 0.0},
    {"loss_scale": 32768.0, "skipped_steps": 1.0, "applied_steps": 0.0, "skipped_total": 6.0, "consecutive_skips": 1.0},
    {"loss_scale": 32768.0, "skipped_steps": 0.0, "applied_steps": 1.0, "skipped_total": 6.0, "consecutive_skips": 0.0},
    {"loss_scale": 32768.0, "skipped_steps": 0.0, "applied_steps": 1.0, "skipped_total": 6.0, "consecutive_skips": 0.0},
]


@pytest.fixture(params=("v1", "fully async"))
def aggregator(request, monkeypatch):
    if request.param == "v1":
        from verl.trainer.ppo.v1.utils import MetricsAggregator

        arguments = ()
    else:
        from verl.experimental.fully_async_policy.detach_utils import MetricsAggregator

        arguments = (1,)
    rules = MetricsAggregator._init_aggregation_rules
    rules = getattr(rules, "__wrapped__", rules)
    monkeypatch.setattr(MetricsAggregator, "_init_aggregation_rules", metrics.add_up_skips(rules))
    return lambda: MetricsAggregator(*arguments)


def aggregated(aggregator, role: str) -> dict:
    for call in CALLS:
        aggregator.add_step_metrics({f"{role}/{name}": value for name, value in call.items()}, sample_count=8)
    return {name: aggregator._aggregate_single_metric(f"{role}/{name}", values) for name, values in _values(aggregator)}


def _values(aggregator):
    return [(name.partition("/")[2], values) for name, values in aggregator.metric_values.items()]


@pytest.mark.parametrize("role", ("actor", "critic"))
def test_counts_are_added_up_and_totals_are_those_at_the_end(aggregator, role, monkeypatch):
    monkeypatch.setattr(plugin, "flag_given", True)
    wanted = {"loss_scale": 32768.0, "skipped_steps": 1.0, "applied_steps": 3.0}
    assert aggregated(aggregator(), role) == {**wanted, "skipped_total": 6.0, "consecutive_skips": 0.0}


def test_without_the_flag_verls_rules_are_as_they_are(aggregator, monkeypatch):
    monkeypatch.setattr(plugin, "flag_given", False)
    assert aggregated(aggregator(), "actor")["skipped_total"] == 23.0
