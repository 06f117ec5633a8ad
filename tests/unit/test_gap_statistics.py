"""The gap's statistics: exact against float64, finite on any input, the same however tokens are split and merged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from verl_fp16.mismatch import statistics
from verl_fp16.mismatch.definitions import STATISTICS
from verl_fp16.mismatch.histogram import count_magnitudes, quantile
from verl_fp16.mismatch.statistics import GapStatistics

QUANTILES = {"log_prob_abs_diff_p50": 0.5, "log_prob_abs_diff_p99": 0.99, "log_prob_abs_diff_p999": 0.999}


def reference(rollout: np.ndarray, training: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Each statistic from its definition, token by token, in float64."""
    mu, pi = rollout.astype(np.float64), training.astype(np.float64)
    good = [np.isfinite(x) & (np.abs(x) <= statistics.LARGEST) for x in (mu, pi)]
    keep = mask & good[0] & good[1]
    found = {
        "tokens": keep.sum(),
        "sequences": keep.any(1).sum(),
        "empty_rows": (~keep.any(1)).sum(),
        "nonfinite_rollout": (mask & ~good[0]).sum(),
        "nonfinite_training": (mask & ~good[1]).sum(),
    }
    if not keep.any():
        return found
    d = mu[keep] - pi[keep]
    c = np.clip(d, -300, 300)
    r = np.exp(-c)
    p_mu = np.exp(np.minimum(mu[keep], 0))
    far = d < -300  # what the cut ratio would hide
    p_pi = np.where(far, np.exp(np.minimum(pi[keep], 0)), np.minimum(p_mu * r, 1))
    gap = np.where(far, p_pi - p_mu, np.clip(p_mu * np.expm1(-c), -1, 1))
    found |= {
        "k1": d.mean(),
        "k2": (d**2).mean() / 2,
        "k3": (np.expm1(-c) + c).mean(),
        "log_prob_abs_diff_mean": np.abs(d).mean(),
        "log_prob_abs_diff_max": np.abs(d).max(),
        "prob_abs_diff_mean": np.abs(gap).mean(),
        "prob_abs_diff_max": np.abs(gap).max(),
        "prob_diff_max": gap.max(),
        "prob_diff_min": gap.min(),
        "token_ess": r.sum() ** 2 / (r**2).sum() / len(r),
        "ratio_outside_share": (np.abs(np.expm1(-c)) > 0.1).mean(),
        "token_mult_prob_error": np.exp(np.abs(c)).mean(),
        "js_divergence_error": np.log(np.cosh(c / 2)).mean(),
    }
    for name, share in QUANTILES.items():
        found[name] = np.quantile(np.abs(d), share, method="inverted_cdf")
    rows = keep.any(1)
    s = np.where(keep, pi - mu, 0).sum(1, where=keep)[rows]
    length = keep.sum(1)[rows].astype(float)
    w = np.exp(np.clip(s, -300, 300))
    found |= {
        "seq_log_ratio_mean": s.mean(),
        "seq_kl": -s.mean(),
        "seq_log_ratio_min": s.min(),
        "seq_log_ratio_max": s.max(),
        "seq_ess": w.sum() ** 2 / (w**2).sum() / len(w),
    }
    if len(s) > 1:
        found["seq_log_ratio_std"] = s.std(ddof=1)
    if len(d) > 1 and p_mu.std() > 1e-4 and p_pi.std() > 1e-4:
        found["prob_pearson"] = np.corrcoef(p_mu, p_pi)[0, 1]
    if len(set(length)) > 1:
        x = length - length.mean()
        slope = (x * s).sum() / (x**2).sum()
        found["slope_per_1k_tokens"] = 1e3 * slope
        if len(s) > 2:
            residual = ((s - s.mean() - slope * x) ** 2).sum()
            found["slope_per_1k_tokens_se"] = 1e3 * math.sqrt(residual / (len(s) - 2) / (x**2).sum())
    return found


def check(found: dict[str, float], rollout: torch.Tensor, training: torch.Tensor, mask: torch.Tensor) -> None:
    arrays = [tensor.double().numpy() for tensor in (rollout, training)]
    with np.errstate(all="ignore"):
        expected = reference(*arrays, mask.numpy() != 0)
    assert all(math.isfinite(value) for value in found.values())
    assert set(expected) - set(found) == set()
    size = max(abs(expected.get("log_prob_abs_diff_max", 0.0)), 1e-300)
    tokens = expected["tokens"]
    for name, value in expected.items():
        if name in QUANTILES:
            assert found[name] == pytest.approx(value, rel=0.01, abs=1e-37), name
        elif name in ("k3", "js_divergence_error"):
            # What numpy's own form loses to cancellation.
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-15), name
        elif name == "prob_pearson":
            assert found[name] == pytest.approx(value, abs=1e-6), name
        elif name.startswith("slope"):
            assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-6 * size * max(tokens, 1)), name
        elif name == "seq_log_ratio_std":
            assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-7 * size * tokens), name
        elif name in ("k1", "seq_log_ratio_mean", "seq_kl", "seq_log_ratio_min", "seq_log_ratio_max"):
            assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-13 * size * tokens), name
        elif name == "seq_ess":
            assert found[name] == pytest.approx(value, rel=1e-6), name
        else:
            assert found[name] == pytest.approx(value, rel=1e-11), name


def batch(seed: int, rows: int, columns: int, scale: float, bad: float, ragged: bool, dtype: torch.dtype):
    random = np.random.default_rng(seed)
    mu = -random.exponential(1.0, (rows, columns))
    pi = mu + random.standard_normal((rows, columns)) * scale
    mask = random.random((rows, columns)) < 0.9
    if ragged:
        mask &= np.arange(columns)[None] < random.integers(0, columns + 1, rows)[:, None]
    tensors = [torch.tensor(x).to(dtype) for x in (mu, pi)]
    for tensor in tensors:
        where = torch.tensor(random.random((rows, columns)) < bad)
        values = torch.tensor([math.inf, -math.inf, math.nan, -1e4, 0.0, -290.0])
        tensor[where] = values[torch.tensor(random.integers(0, len(values), (rows, columns)))][where].to(dtype)
    return *tensors, torch.tensor(mask)


batches = st.builds(
    batch,
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 9),
    columns=st.integers(0, 70),
    scale=st.sampled_from([0.0, 1e-7, 1e-3, 0.3, 5.0, 200.0]),
    bad=st.sampled_from([0.0, 0.02, 0.5]),
    ragged=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)


@settings(max_examples=150, deadline=None)
@given(batches, st.sampled_from([16, 64, 2**17]))
def test_against_the_definitions_in_float64(tokens, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_CHUNK", chunk)
        gap = GapStatistics()
        rows = gap.add(*tokens)
    check(gap.scalars(), *tokens)
    assert len(rows.s) == len(rows.length) == len(tokens[0])


@settings(max_examples=100, deadline=None)
@given(batches, st.lists(st.integers(0, 9), max_size=4), st.randoms())
def test_parts_merge_into_the_whole_in_any_order(tokens, cuts, random):
    whole = GapStatistics()
    whole.add(*tokens)
    edges = [0, *sorted(min(cut, len(tokens[0])) for cut in cuts), len(tokens[0])]
    parts = []
    for start, end in zip(edges, edges[1:], strict=False):
        part = GapStatistics()
        part.add(*(tensor[start:end] for tensor in tokens))
        parts.append(part)
    random.shuffle(parts)
    merged = GapStatistics()
    for part in parts:
        merged.merge(part)
    check(merged.scalars(), *tokens)
    assert torch.equal(merged._histogram, whole._histogram)
    assert torch.equal(merged._maxima, whole._maxima)
    for mine, theirs in zip(merged.curves()["length"], whole.curves()["length"], strict=True):
        assert mine["sequences"] == theirs["sequences"] and mine["first"] == theirs["first"]


@settings(max_examples=100, deadline=None)
@given(batches, st.sampled_from([7, 2**17]))
def test_packed_sequences_give_what_padded_ones_give(tokens, chunk):
    rollout, training, mask = tokens
    padded = GapStatistics()
    rows = padded.add(*tokens)
    offsets = torch.arange(len(rollout) + 1) * rollout.shape[1]
    packed = GapStatistics()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_CHUNK", chunk)
        again = packed.add_packed(rollout.reshape(-1), training.reshape(-1), mask.reshape(-1), offsets)
    check(packed.scalars(), *tokens)
    assert torch.equal(again.length, rows.length)
    assert torch.allclose(
        again.s, rows.s, rtol=1e-12, atol=1e-9 * max(1.0, float(rows.s.abs().amax()) if len(rows.s) else 0)
    )
    assert [row["tokens"] for row in packed.curves()["position"]] == [r["tokens"] for r in padded.curves()["position"]]


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # What makes a GPU's host wait: reading a number, and results whose size is a number on the device.
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal"), name
        return function(*args, **(kwargs or {}))


@settings(max_examples=100, deadline=None)
@given(batches)
def test_where_nothing_may_be_read_the_numbers_are_the_same(tokens):
    gap, packed = GapStatistics(), GapStatistics()
    gap._reads = packed._reads = False
    offsets = torch.arange(len(tokens[0]) + 1) * tokens[0].shape[1]
    with NoReads():
        gap.add(*tokens)
        packed.add_packed(*(tensor.reshape(-1) for tensor in tokens), offsets)
    check(gap.scalars(), *tokens)
    check(packed.scalars(), *tokens)


@pytest.mark.parametrize("reads", (True, False))
def test_small_ratios_keep_their_digits_beside_padding(reads):
    gap = GapStatistics()
    gap._reads = reads
    rollout, training, mask = torch.full((3, 1, 1000), -1.0).unbind(0)
    training, mask = training.clone(), torch.zeros(1, 1000)
    training[0, :2], mask[0, :2] = torch.tensor([-41.0, -46.0]), 1
    gap.add(rollout, training, mask)
    small, smaller = math.exp(-40), math.exp(-45)
    expected = (small + smaller) ** 2 / (small**2 + smaller**2) / 2
    assert gap.scalars()["token_ess"] == pytest.approx(expected, rel=1e-9)
    assert gap.scalars()["token_mult_prob_error"] == pytest.approx((1 / small + 1 / smaller) / 2, rel=1e-9)


@pytest.mark.parametrize("reads", (True, False))
@pytest.mark.parametrize("rollout", (-1000.0, -9999.0))
def test_a_token_that_only_training_finds_likely_has_its_whole_gap(reads, rollout):
    gap = GapStatistics()
    gap._reads = reads
    gap.add(torch.tensor([[rollout, -0.5]]), torch.tensor([[-0.1, -0.5]]), torch.ones(1, 2))
    found = gap.scalars()
    assert found["prob_diff_max"] == found["prob_abs_diff_max"] == pytest.approx(math.exp(-0.1), rel=1e-6)
    assert found["prob_diff_min"] == 0


def test_what_is_too_large_to_be_squared_is_not_finite():
    gap = GapStatistics()
    gap.add(torch.tensor([[-1e120, -1.0]], dtype=torch.float64), torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2))
    gap.add(torch.tensor([[-1.0]]), torch.tensor([[-1e120]], dtype=torch.float64), torch.ones(1, 1))
    found = gap.scalars()
    assert (found["nonfinite_rollout"], found["nonfinite_training"], found["tokens"]) == (1, 1, 1)
    assert all(math.isfinite(value) for value in found.values())


def test_tensors_of_a_graph_are_taken_without_it():
    rows = [torch.full((1, 3), -1.0, requires_grad=True) for _ in range(2)]
    gap = GapStatistics()
    gap.add(*rows, torch.ones(1, 3))
    gap.add_packed(*(row[0] for row in rows), torch.ones(3), torch.tensor([0, 3]))
    assert gap.scalars()["tokens"] == 6 and not gap._sums.requires_grad


def test_every_statistic_is_defined_and_compared():
    random = torch.Generator().manual_seed(0)
    mu = -torch.rand(20, 50, generator=random)
    pi = mu + torch.randn(20, 50, generator=random) * 0.01
    mask = torch.arange(50)[None] < torch.arange(20)[:, None] * 2
    gap = GapStatistics()
    gap.add(mu, pi, mask)
    names = [statistic.name for statistic in STATISTICS]
    assert list(gap.scalars()) == names and len(set(names)) == len(names)
    assert set(reference(mu.numpy(), pi.numpy(), mask.numpy())) == set(names)
    assert all(statistic.definition for statistic in STATISTICS)


@pytest.mark.parametrize("count", (0, 1, 2, 10, 1000))
@pytest.mark.parametrize("share", (0.001, 0.5, 0.99, 0.999, 1.0))
def test_quantiles_are_within_one_percent_over_all_magnitudes(count, share):
    random = np.random.default_rng(count)
    values = 10.0 ** random.uniform(-36, 38, count)
    found = quantile(count_magnitudes(torch.tensor(values)), share)
    assert found == (pytest.approx(np.quantile(values, share, method="inverted_cdf"), rel=0.01) if count else 0.0)


def test_a_growing_bias_is_the_slope_and_shows_in_the_curves():
    """The paper's figure: a constant bias a token makes log pi / mu fall in proportion to length."""
    lengths = torch.tensor([100, 400, 900, 1600])
    mask = torch.arange(1600)[None] < lengths[:, None]
    mu = torch.full((4, 1600), -1.0, dtype=torch.float64)
    gap = GapStatistics()
    gap.add(mu, mu - 0.00101, mask)
    found = gap.scalars()
    assert found["slope_per_1k_tokens"] == pytest.approx(-1.01, rel=1e-9)
    assert found["slope_per_1k_tokens_se"] == pytest.approx(0.0, abs=1e-6)
    curves = gap.curves()
    assert sum(row["tokens"] for row in curves["position"]) == 3000
    assert all(row["k1"] == pytest.approx(0.00101) for row in curves["position"])
    assert curves["position"][0]["first"] == curves["position"][0]["last"] == 0
    assert all(a["last"] + 1 == b["first"] for a, b in zip(curves["position"], curves["position"][1:], strict=False))
    assert curves["position"][-1]["first"] <= 1599 <= curves["position"][-1]["last"]
    assert [row["length_mean"] for row in curves["length"]] == lengths.tolist()
    assert all(row["first"] <= row["length_mean"] <= row["last"] for row in curves["length"])
    assert [row["seq_log_ratio_mean"] for row in curves["length"]] == pytest.approx((-0.00101 * lengths).tolist())


ABSURD = st.sampled_from([0.0, -1.0, 1e-30, 5.0, -1e30, 3e38, -3e38, 1e99, -1e99, 1e300, -1e300, math.inf, math.nan])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(ABSURD, ABSURD, st.booleans()), min_size=1, max_size=24), st.booleans())
def test_whatever_comes_in_what_comes_out_is_finite(tokens, single):
    """Float sums of such numbers depend on their order; what is asked is that none of them spreads."""
    rollout, training, mask = (
        torch.tensor(column, dtype=torch.float64).view(1, -1) for column in zip(*tokens, strict=True)
    )
    if single:
        rollout, training = rollout.float(), training.float()
    gap = GapStatistics()
    gap.add(rollout, training, mask)
    gap.merge(gap)
    found = gap.scalars()
    assert all(math.isfinite(value) for value in found.values())
    assert all(math.isfinite(value) for rows in gap.curves().values() for row in rows for value in row.values())
    good = [x.double().abs() <= statistics.LARGEST for x in (rollout, training)]
    assert found["tokens"] == 2 * (mask.bool() & good[0] & good[1]).sum()
    assert found["nonfinite_rollout"] == 2 * (mask.bool() & ~good[0]).sum()
    assert found["nonfinite_training"] == 2 * (mask.bool() & ~good[1]).sum()


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"of one shape \(sequences, positions\), got \(2, 3\), \(2, 3\), \(3, 2\)"):
        GapStatistics().add(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="of one shape"):
        GapStatistics().add(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"offsets must begin with 0 and end with 4, the number of tokens"):
        GapStatistics().add_packed(torch.zeros(4), torch.zeros(4), torch.ones(4), torch.tensor([0, 3]))
