"""The gap's statistics against float64, and what non-finite tokens do to them: nothing but be counted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_fp16.mismatch.statistics import gap_metrics, k3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(-30, 0, width=32),
            st.floats(-30, 0, width=32),
            st.booleans(),
            st.sampled_from([None, math.inf, -math.inf, math.nan]),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_against_a_plain_loop_in_float64(tokens):
    rollout = torch.tensor([bad if bad is not None else mu for mu, _, _, bad in tokens])
    training = torch.tensor([pi for _, pi, _, _ in tokens])
    mask = torch.tensor([counts for _, _, counts, _ in tokens])
    metrics = gap_metrics(rollout, training, mask)
    assert metrics["mismatch/left_out_tokens"] == sum(counts and bad is not None for _, _, counts, bad in tokens)
    kept = [mu - pi for mu, pi, counts, bad in tokens if counts and bad is None]
    if not kept:
        assert set(metrics) == {"mismatch/left_out_tokens"}
        return
    assert metrics["mismatch/log_prob_abs_diff_mean"] == pytest.approx(sum(map(abs, kept)) / len(kept), rel=1e-12)
    by_hand = sum(math.expm1(-d) + d for d in kept) / len(kept)
    assert metrics["mismatch/k3"] == pytest.approx(by_hand, rel=1e-9, abs=1e-18)
    assert all(math.isfinite(value) for value in metrics.values())


def test_k3_keeps_its_digits_at_small_differences():
    d = torch.tensor([1e-7], dtype=torch.float64)
    assert k3(d).item() == pytest.approx(5e-15, rel=1e-2), "d^2 / 2, where exp(-d) - 1 + d has no digit left"


def test_the_hook_acts_only_where_the_flag_was_resolved(monkeypatch):
    from types import SimpleNamespace

    from verl_fp16 import plugin
    from verl_fp16.hooks.metrics import add_log_prob_gap

    rows = torch.tensor([[-1.0, -2.0, -9.0]])
    batch = {
        "rollout_log_probs": rows,
        "old_log_probs": rows - torch.tensor([[0.5, 0.0, 7.0]]),
        "response_mask": torch.tensor([[1, 1, 0]]),
        "responses": torch.zeros(1, 3),
    }
    wrapped = add_log_prob_gap(lambda data: {"theirs": 1})
    monkeypatch.setattr(plugin, "flag_given", False)
    assert wrapped(SimpleNamespace(batch=batch)) == {"theirs": 1}
    monkeypatch.setattr(plugin, "flag_given", True)
    metrics = wrapped(SimpleNamespace(batch=batch))
    assert metrics["theirs"] == 1
    assert metrics["mismatch/log_prob_abs_diff_mean"] == 0.25, "the padding token does not count"


@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("side", ("rollout", "training"))
def test_a_non_finite_token_of_either_side_is_counted_and_left_out(side, bad):
    good, broken = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, bad])
    rollout, training = (broken, good) if side == "rollout" else (good, broken)
    metrics = gap_metrics(rollout, training, torch.ones(2))
    assert metrics["mismatch/left_out_tokens"] == 1
    assert metrics["mismatch/log_prob_abs_diff_mean"] == 0.5
