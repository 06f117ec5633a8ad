"""Numbers with intervals from the sequences of a gap; numpy. Definitions: :mod:`verl_fp16.mismatch.definitions`.

Intervals are percentile bootstrap intervals over sequences, the unit that was sampled. Pairs that were measured on the
same sequences are resampled together, so that their factor is that of paired measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
_AT_ONCE = 2**22  # numbers of a resample that are in memory at a time


@dataclass(frozen=True)
class Sequences:
    """One row a sequence, float64, all of shape (sequences,).

    Args:
        length: tokens that count.
        s: sum of log pi - log mu, nats.
        abs_sum: sum of |d|, nats.
        k3_sum: sum of exp(-d) - 1 + d, nats.
    """

    length: np.ndarray
    s: np.ndarray
    abs_sum: np.ndarray
    k3_sum: np.ndarray

    def __len__(self) -> int:
        return len(self.length)


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high


def slope(length: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Of the straight line through (length, s), nats per 1,000 tokens, over the last axis; nan where lengths agree."""
    x = length - length.mean(-1, keepdims=True)
    spread = (x * x).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, 1e3 * (x * s).sum(-1) / spread, np.nan)


STATISTICS: Mapping[str, Callable[..., np.ndarray]] = {
    "log_prob_abs_diff_mean": lambda q: q.abs_sum.sum(-1) / q.length.sum(-1),
    "k3": lambda q: q.k3_sum.sum(-1) / q.length.sum(-1),
    "k1": lambda q: -q.s.sum(-1) / q.length.sum(-1),
    "seq_kl": lambda q: -q.s.mean(-1),
    "slope_per_1k_tokens": lambda q: slope(q.length, q.s),
}
FACTORS = ("log_prob_abs_diff_mean", "k3", "seq_kl")


def resample(
    pairs: Mapping[str, Sequences], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, dict[str, np.ndarray]]:
    """Pair -> statistic -> its value in each resample. Pairs of as many sequences are resampled together.

    Raises:
        ValueError: a pair has no sequence.
    """
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for name, sequences in pairs.items():
        if not len(sequences):
            raise ValueError(f"{name}: there is no sequence in it")
        random = np.random.default_rng([seed, len(sequences)])
        at_once = max(1, _AT_ONCE // len(sequences))
        values = found.setdefault(name, {statistic: [] for statistic in STATISTICS})
        for start in range(0, resamples, at_once):
            picks = random.integers(len(sequences), size=(min(at_once, resamples - start), len(sequences)))
            drawn = Sequences(*(column[picks] for column in columns(sequences)))
            for statistic, value in STATISTICS.items():
                values[statistic].append(value(drawn))
    return {
        name: {statistic: np.concatenate(parts) for statistic, parts in values.items()}
        for name, values in found.items()
    }


def columns(sequences: Sequences) -> tuple[np.ndarray, ...]:
    return sequences.length, sequences.s, sequences.abs_sum, sequences.k3_sum


def measure(
    pairs: Mapping[str, Sequences], drawn: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, Interval]]:
    """Pair -> statistic -> its value with an interval."""
    return {
        name: {
            statistic: _interval(float(value(sequences)), drawn[name][statistic])
            for statistic, value in STATISTICS.items()
        }
        for name, sequences in pairs.items()
    }


def factors(
    base: str, measured: Mapping[str, Mapping[str, Interval]], drawn: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, Interval]]:
    """Other pair -> statistic -> by how much that of ``base`` is larger."""
    found: dict[str, dict[str, Interval]] = {}
    for name in measured:
        if name == base:
            continue
        found[name] = {}
        for statistic in FACTORS:
            with np.errstate(invalid="ignore", divide="ignore"):
                ratios = drawn[base][statistic] / drawn[name][statistic]
                value = np.float64(measured[base][statistic].value) / measured[name][statistic].value
            found[name][statistic] = _interval(float(value), ratios)
    return found


def _interval(value: float, samples: np.ndarray) -> Interval:
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
