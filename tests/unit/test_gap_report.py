"""The offline analysis of the gap: pairs, intervals, factors, the figure."""

from __future__ import annotations

import numpy as np
import pytest

from verl_fp16.gap_report import analysis, figure
from verl_fp16.gap_report.analysis import Interval, Sequences
from verl_fp16.gap_report.errors import GapError
from verl_fp16.gap_report.sides import ladder, parse_pairs


def sequences_of(
    gap: float, bias: float = 0.0, number: int = 400, seed: int = 0
) -> tuple[Sequences, np.ndarray, np.ndarray]:
    """Sequences of 100 to 2,000 tokens whose d is normal, with a bias against training."""
    random = np.random.default_rng(seed)
    lengths = random.integers(100, 2000, number)
    rows, rollout, training = [], [], []
    for length in lengths:
        mu = -4 * random.random(length) ** 4
        d = gap * random.standard_normal(length) + bias
        rows.append((length, -d.sum(), np.abs(d).sum(), (np.expm1(-d) + d).sum()))
        rollout.append(mu)
        training.append(mu - d)
    columns = (*np.array(rows, dtype=float).T, np.arange(number))
    return Sequences(*columns), np.concatenate(rollout), np.concatenate(training)


def test_pairs_are_read_and_written_as_they_are_named():
    own = parse_pairs("bf16, fp16,bf16/fp16,fp16", same_tokens=False)
    assert [one.name for one in own] == ["bf16", "fp16", "bf16/fp16"]
    assert [(one.training.precision, one.rollout.precision) for one in own] == [
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("bf16", "fp16"),
    ]
    assert all(one.tokens == one.rollout and not one.scored for one in own)
    same = parse_pairs("bf16,fp16", same_tokens=True)
    assert all(one.tokens == same[0].rollout and one.scored for one in same)
    for wrong in ("", "fp8", "fp16,", "fp16/bf16/fp32"):
        with pytest.raises(GapError, match="it has to be fp16, bf16, fp32, or TRAINING/ROLLOUT"):
            parse_pairs(wrong, same_tokens=False)


def test_rows_of_the_ladder_differ_in_what_their_names_say():
    rows = ladder()
    assert len({one.name for one in rows}) == len(rows)
    assert len({(one.training, one.rollout, one.scored) for one in rows}) == len(rows)
    assert len({one.training.slug for one in rows}) == len({one.training for one in rows})
    assert len({one.rollout.slug for one in rows}) == len({one.rollout for one in rows})
    assert {one.tokens.slug for one in rows if one.scored} == {"fp16"}


def test_intervals_hold_what_was_planted():
    coarse, fine = sequences_of(8e-3, bias=1e-3)[0], sequences_of(1e-3)[0]
    pairs = {"bf16": coarse, "fp16": fine}
    drawn = analysis.resample(pairs)
    measured = analysis.measure(pairs, drawn)
    factors = analysis.factors("bf16", measured, drawn)
    assert -1.0 in measured["bf16"]["slope_per_1k_tokens"] and 0.0 not in measured["bf16"]["slope_per_1k_tokens"]
    assert 0.0 in measured["fp16"]["slope_per_1k_tokens"]
    assert measured["fp16"]["log_prob_abs_diff_mean"].value == pytest.approx(1e-3 * np.sqrt(2 / np.pi), rel=0.01)
    assert factors.keys() == {"fp16"} and 7.5 < factors["fp16"]["log_prob_abs_diff_mean"].value < 8.5
    assert 64.0 < factors["fp16"]["k3"].low < factors["fp16"]["k3"].value < factors["fp16"]["k3"].high < 67
    assert measured["bf16"]["seq_kl"].value == pytest.approx(coarse.length.mean() * 1e-3, rel=0.05)


def test_intervals_cover_as_often_as_they_say():
    """Of 95% intervals, about one in twenty misses."""
    hits = 0
    for seed in range(60):
        pairs = {"p": sequences_of(1e-2, number=80, seed=seed)[0]}
        found = analysis.measure(pairs, analysis.resample(pairs, resamples=400))
        hits += 0.0 in found["p"]["slope_per_1k_tokens"]
    assert 51 <= hits <= 60


def test_pairs_on_the_same_sequences_are_resampled_together():
    one = sequences_of(1e-3)[0]
    twice = Sequences(one.length, 2 * one.s, 2 * one.abs_sum, 2 * one.k3_sum, one.prompt)
    pairs = {"a": twice, "b": one}
    drawn = analysis.resample(pairs, resamples=100)
    factor = analysis.factors("a", analysis.measure(pairs, drawn), drawn)["b"]["k3"]
    assert factor.low == pytest.approx(2) and factor.high == pytest.approx(2)


def test_what_cannot_be_measured_is_nan_and_an_empty_pair_an_error():
    equal = Sequences(*np.ones((4, 5)), np.arange(5))
    pairs = {"p": equal}
    found = analysis.measure(pairs, analysis.resample(pairs, resamples=10))["p"]["slope_per_1k_tokens"]
    assert np.isnan([found.value, found.low, found.high]).all()
    with pytest.raises(ValueError, match="there is no sequence in it"):
        analysis.resample({"p": Sequences(*np.ones((4, 0)), np.arange(0))})


def test_intervals_are_of_the_middle_95_percent():
    found = analysis._interval(500.0, np.random.default_rng(0).permutation(np.append(np.arange(1001.0), np.nan)))
    assert (found.low, found.high) == pytest.approx((25, 975))


def test_slopes_are_those_of_least_squares():
    one = sequences_of(1e-2, bias=1e-3, number=50)[0]
    found = analysis.measure({"p": one}, analysis.resample({"p": one}, resamples=10))["p"]["slope_per_1k_tokens"]
    assert found.value == pytest.approx(1e3 * np.polyfit(one.length, one.s, 1)[0], rel=1e-9)


def test_intervals_cover_where_answers_of_a_prompt_are_alike():
    """What is sampled is prompts: answers that share a prompt's gap tell hardly more than one of them."""
    hits = {"mean": 0, "alone": 0}
    for seed in range(60):
        random = np.random.default_rng(seed)
        prompt = np.repeat(np.arange(40), 8)
        gap = 1 + 0.5 * random.standard_normal(40)[prompt] + 0.05 * random.standard_normal(320)
        length = np.full(320, 100.0)
        for name, groups in (("mean", prompt), ("alone", np.arange(320))):
            pairs = {"p": Sequences(length, -gap, gap * length, gap, groups)}
            found = analysis.measure(pairs, analysis.resample(pairs, resamples=400))["p"]["log_prob_abs_diff_mean"]
            hits[name] += 1.0 in found
    assert hits["mean"] >= 51 and hits["alone"] < 45, hits


def test_answers_of_a_single_prompt_have_an_interval_of_their_own():
    one = sequences_of(1e-2, number=30)[0]
    alike = Sequences(one.length, one.s, one.abs_sum, one.k3_sum, np.zeros(30, dtype=int))
    pairs = {"p": alike}
    found = analysis.measure(pairs, analysis.resample(pairs))["p"]["k3"]
    assert found.low < found.value < found.high


def test_a_factor_over_what_may_be_zero_is_none():
    random = np.random.default_rng(0)
    coarse, fine = (sequences_of(gap, bias)[0] for gap, bias in ((8e-3, 1e-3), (1e-3, 0.0)))
    noise = Sequences(fine.length, random.standard_normal(400), fine.abs_sum, fine.k3_sum, fine.prompt)
    pairs = {"bf16": coarse, "fp16": noise}
    drawn = analysis.resample(pairs)
    measured = analysis.measure(pairs, drawn)
    assert 0.0 in measured["fp16"]["seq_kl"]
    found = analysis.factors("bf16", measured, drawn)["fp16"]
    assert np.isnan([found["seq_kl"].value, found["seq_kl"].low, found["seq_kl"].high]).all()
    assert found["k3"].low > 60


def test_the_figures_are_drawn(tmp_path):
    pairs, panels = {}, []
    for name, gap, bias in (("bf16", 8e-3, 1e-3), ("fp16", 1e-3, 0.0)):
        pairs[name], rollout, training = sequences_of(gap, bias)
        panels.append((name, figure.token_counts(rollout, training)))
    drawn = analysis.resample(pairs, resamples=200)
    measured = analysis.measure(pairs, drawn)
    shown = [figure.Panel(n, counts, pairs[n], measured[n]["slope_per_1k_tokens"]) for n, counts in panels]
    file = figure.draw(shown, tmp_path / "mismatch.png", "a model, 400 sequences")
    assert file.read_bytes()[:4] == b"\x89PNG"
    assert sum(panels[0][1].ravel()) == pairs["bf16"].length.sum(), "no token is lost"
    bars = figure.draw_ladder(measured, (("k3", "k3, nats"),), tmp_path / "ladder.png", "a model")
    assert bars.read_bytes()[:4] == b"\x89PNG"


def test_intervals_are_written_as_far_as_they_are_known():
    assert figure.written(Interval(1.25, 1.1, 1.4)) == "1.25 [1.1, 1.4]"
    assert figure.written(Interval(1.25, np.nan, np.nan)) == "1.25"
    assert figure.written(Interval(np.nan, np.nan, np.nan)) == "-"
