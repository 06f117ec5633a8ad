"""What each statistic of the gap between rollout and training policy means, and how it comes from sums.

mu is the rollout policy, pi the training policy; of a token that mu sampled, ``d = log mu - log pi`` in nats, and
``r = pi / mu = exp(-d)``. A token counts where the response mask has it and both of its log-probabilities are finite;
means are over the tokens that count. A sequence is a row with at least one of them, ``L`` is their number and
``s = sum(log pi - log mu)`` over them. Wherever ``r`` or ``exp(s)`` is needed, ``d`` and ``s`` are cut to [-300, 300],
so that no single token makes a mean infinite. Probabilities are not: they are cut to 1 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from verl_fp16.mismatch.histogram import quantile

CUT = 300.0
"""Nats: the largest |d| in what is computed from the ratio exp(-d), and the largest |s|."""

_SCHULMAN = 'J. Schulman, "Approximating KL Divergence", 2020'
_PAPER = "Qi et al., arXiv 2510.26788"
_NEMO = "NeMo-RL, loss functions"


@dataclass(frozen=True)
class Totals:
    """Sums over tokens and sequences, largest values, and the histogram of |d|; see :mod:`.statistics`."""

    sums: Mapping[str, float]
    maxima: Mapping[str, float]
    histogram: torch.Tensor

    def __getitem__(self, name: str) -> float:
        return self.sums[name]

    def mean(self, name: str) -> float | None:
        return self[name] / self["tokens"] if self["tokens"] else None

    def sequence_mean(self, name: str) -> float | None:
        return self[name] / self["sequences"] if self["sequences"] else None

    def largest(self, name: str, sign: float = 1.0) -> float | None:
        value = self.maxima[name]
        return sign * value if math.isfinite(value) and self["tokens"] else None

    def quantile(self, share: float) -> float | None:
        return min(quantile(self.histogram, share), self.maxima["abs"]) if self["tokens"] else None


@dataclass(frozen=True)
class Statistic:
    """One number that is logged.

    Args:
        name: in the log, after ``mismatch/``.
        definition: what it is.
        source: who defined it, or logs the same; "" where it explains itself.
        value: from totals; None where they do not define it.
    """

    name: str
    definition: str
    source: str
    value: Callable[[Totals], float | None]


def scalars(totals: Totals) -> dict[str, float]:
    """Name -> value of each statistic that ``totals`` define."""
    values = {statistic.name: statistic.value(totals) for statistic in STATISTICS}
    return {name: value for name, value in values.items() if value is not None}


def _pearson(t: Totals) -> float | None:
    n = t["tokens"]
    if n < 2:
        return None
    of_mu = t["mu_square"] - t["mu"] ** 2 / n
    of_pi = t["pi_square"] - t["pi"] ** 2 / n
    # Of less than this, rounding is all that is left of the difference.
    if min(of_mu, of_pi) <= 1e-13 * max(t["mu_square"], t["pi_square"]):
        return None
    return max(-1.0, min(1.0, (t["mu_pi"] - t["mu"] * t["pi"] / n) / math.sqrt(of_mu * of_pi)))


def _effective(total: str, squares: str, count: str) -> Callable[[Totals], float | None]:
    def share(t: Totals) -> float | None:
        return t[total] ** 2 / t[squares] / t[count] if t[count] and t[squares] else None

    return share


def _variation(t: Totals, square: str, mean: str, other: str | None = None) -> float:
    """Sum of squares, or of products, of deviations from the mean."""
    return t[square] - t[mean] * t[other or mean] / t["sequences"]


def _std(t: Totals) -> float | None:
    if t["sequences"] < 2:
        return None
    return math.sqrt(max(0.0, _variation(t, "s_square", "s")) / (t["sequences"] - 1))


def _slope(t: Totals) -> float | None:
    """Of s over L, with an intercept; None where lengths do not differ."""
    if t["sequences"] < 2 or (spread := _variation(t, "length_square", "length")) <= 1e-13 * t["length_square"]:
        return None
    return _variation(t, "s_length", "s", "length") / spread


def _slope_error(t: Totals) -> float | None:
    slope = _slope(t)
    if slope is None or t["sequences"] < 3:
        return None
    residual = _variation(t, "s_square", "s") - slope * _variation(t, "s_length", "s", "length")
    spread = _variation(t, "length_square", "length")
    return math.sqrt(max(0.0, residual) / (t["sequences"] - 2) / spread)


def _times(factor: float, value: Callable[[Totals], float | None]) -> Callable[[Totals], float | None]:
    def scaled(t: Totals) -> float | None:
        found = value(t)
        return None if found is None else factor * found

    return scaled


STATISTICS = (
    Statistic("k1", "mean d: the plain estimate of KL(mu, pi), nats", _SCHULMAN, lambda t: t.mean("d")),
    Statistic("k2", "mean d^2 / 2, nats", _SCHULMAN, _times(0.5, lambda t: t.mean("square"))),
    Statistic("k3", "mean exp(-d) - 1 + d, nats", _SCHULMAN, lambda t: t.mean("k3")),
    Statistic("log_prob_abs_diff_mean", "mean |d|, nats", "TRL, slime, SkyRL", lambda t: t.mean("abs")),
    Statistic("log_prob_abs_diff_p50", "median of |d|, within 1%", "", lambda t: t.quantile(0.5)),
    Statistic("log_prob_abs_diff_p99", "99% quantile of |d|, within 1%", "", lambda t: t.quantile(0.99)),
    Statistic("log_prob_abs_diff_p999", "99.9% quantile of |d|, within 1%", "", lambda t: t.quantile(0.999)),
    Statistic("log_prob_abs_diff_max", "largest |d|, nats", "TRL, SkyRL", lambda t: t.largest("abs")),
    Statistic(
        "prob_abs_diff_mean", "mean |pi - mu|", "verl, training/rollout_probs_diff_mean", lambda t: t.mean("prob_abs")
    ),
    Statistic(
        "prob_abs_diff_max",
        "largest |pi - mu|",
        "verl, training/rollout_probs_diff_max",
        lambda t: max(t.maxima["prob"], t.maxima["minus_prob"]) if t["tokens"] else None,
    ),
    Statistic("prob_diff_max", "largest pi - mu; near 1 before a collapse", _PAPER, lambda t: t.largest("prob")),
    Statistic(
        "prob_diff_min", "smallest pi - mu; near -1 before a collapse", _PAPER, lambda t: t.largest("minus_prob", -1.0)
    ),
    Statistic("prob_pearson", "correlation of pi and mu over tokens", "verl, arXiv 2506.13585", _pearson),
    Statistic("seq_log_ratio_mean", "mean s, nats", _PAPER, lambda t: t.sequence_mean("s")),
    Statistic("seq_log_ratio_std", "standard deviation of s (n - 1)", _PAPER, _std),
    Statistic("seq_log_ratio_min", "smallest s", _PAPER, lambda t: t.largest("minus_s", -1.0)),
    Statistic("seq_log_ratio_max", "largest s", _PAPER, lambda t: t.largest("s")),
    Statistic(
        "seq_kl",
        "mean -s: the estimate of the sequence KL(mu, pi), nats",
        _PAPER,
        _times(-1.0, lambda t: t.sequence_mean("s")),
    ),
    Statistic(
        "slope_per_1k_tokens",
        "slope of the straight line through (L, s), nats per 1,000 tokens",
        _PAPER,
        _times(1e3, _slope),
    ),
    Statistic("slope_per_1k_tokens_se", "standard error of that slope", "least squares", _times(1e3, _slope_error)),
    Statistic(
        "token_ess",
        "(sum r)^2 / sum r^2, as a share of the tokens",
        "Kish, 1965",
        _effective("ratio", "ratio_square", "tokens"),
    ),
    Statistic(
        "seq_ess",
        "(sum exp(s))^2 / sum exp(s)^2, as a share of the sequences",
        "Kish, 1965",
        _effective("weight", "weight_square", "sequences"),
    ),
    Statistic(
        "ratio_outside_share", "share of tokens whose r is outside [0.9, 1.1]", _PAPER, lambda t: t.mean("outside")
    ),
    Statistic("token_mult_prob_error", "mean exp(|d|)", _NEMO, lambda t: t.mean("multiplied")),
    Statistic(
        "js_divergence_error",
        "mean log cosh(d / 2): k3 of mu and pi against their mixture, averaged",
        _NEMO,
        lambda t: t.mean("js"),
    ),
    Statistic("tokens", "tokens that count", "", lambda t: t["tokens"]),
    Statistic("sequences", "rows with a token that counts", "", lambda t: t["sequences"]),
    Statistic("empty_rows", "rows without one, verl's padding rows too", "", lambda t: t["rows"] - t["sequences"]),
    Statistic(
        "nonfinite_rollout", "tokens of the mask with a log mu that is not finite", "", lambda t: t["bad_rollout"]
    ),
    Statistic(
        "nonfinite_training", "tokens of the mask with a log pi that is not finite", "", lambda t: t["bad_training"]
    ),
)
