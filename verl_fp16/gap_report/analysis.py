"""Numbers with intervals from the sequences of a gap; numpy. Definitions: :mod:`verl_fp16.mismatch.definitions`.

Intervals are percentile bootstrap intervals over prompts: a prompt's answers are drawn together, since they are alike
and tell less than as many answers of different prompts. Pairs that were measured on the same prompts are resampled
together, so that their factor is that of paired measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
_AT_ONCE = 2**22  # numbers of a resample that are in memory at a time
# Lengths are whole numbers: where two of them differ, their squared deviations sum to half at least.
_LEAST_SPREAD = 0.25


@dataclass(frozen=True)
class Sequences:
    """One row a sequence, all of shape (sequences,); float64 but for ``prompt``.

    Args:
        length: tokens that count, whole numbers.
        s: sum of log pi - log mu, nats.
        abs_sum: sum of |d|, nats.
        k3_sum: sum of exp(-d) - 1 + d, nats.
        prompt: int64, the same of the answers of one prompt.
    """

    length: np.ndarray
    s: np.ndarray
    abs_sum: np.ndarray
    k3_sum: np.ndarray
    prompt: np.ndarray

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, rows: np.ndarray) -> Sequences:
        """Of these rows: a mask or numbers."""
        return Sequences(*(column[rows] for column in (self.length, self.s, self.abs_sum, self.k3_sum, self.prompt)))


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high


class _Sums(NamedTuple):
    """Over sequences, of any shape: their number, and sums of what :class:`Sequences` has.

    ``x`` is the length less ``centre``, which does not change a slope and keeps its sums small.
    """

    number: np.ndarray
    length: np.ndarray
    s: np.ndarray
    abs_sum: np.ndarray
    k3_sum: np.ndarray
    x: np.ndarray
    xx: np.ndarray
    xs: np.ndarray


def _slope(sums: _Sums) -> np.ndarray:
    """Of the straight line through (length, s), nats per 1,000 tokens; nan where lengths agree."""
    spread = sums.xx - sums.x * sums.x / sums.number
    with np.errstate(invalid="ignore", divide="ignore"):
        line = 1e3 * (sums.xs - sums.x * sums.s / sums.number) / spread
    return np.where(spread > _LEAST_SPREAD, line, np.nan)


STATISTICS: Mapping[str, Callable[[_Sums], np.ndarray]] = {
    "log_prob_abs_diff_mean": lambda q: q.abs_sum / q.length,
    "k3": lambda q: q.k3_sum / q.length,
    "k1": lambda q: -q.s / q.length,
    "seq_kl": lambda q: -q.s / q.number,
    "slope_per_1k_tokens": _slope,
}
FACTORS = ("log_prob_abs_diff_mean", "k3", "seq_kl")


def _by_prompt(sequences: Sequences) -> np.ndarray:
    """The sums of each prompt, in their order, of shape (prompts, fields of :class:`_Sums`).

    Where all are of one prompt, those of each sequence: what its answers can tell is how far they are apart.
    """
    _, place = np.unique(sequences.prompt, return_inverse=True)
    if place.max(initial=0) == 0:
        place = np.arange(len(sequences))
    x = sequences.length - np.round(sequences.length.mean())
    sums = _Sums(
        np.ones(len(sequences)),
        sequences.length,
        sequences.s,
        sequences.abs_sum,
        sequences.k3_sum,
        x,
        x * x,
        x * sequences.s,
    )
    return np.stack([np.bincount(place, column) for column in sums], axis=1)


def resample(
    pairs: Mapping[str, Sequences], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, dict[str, np.ndarray]]:
    """Pair -> statistic -> its value in each resample. Pairs of as many prompts are resampled together.

    Raises:
        ValueError: a pair has no sequence.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, sequences in pairs.items():
        if not len(sequences):
            raise ValueError(f"{name}: there is no sequence in it")
        sums = _by_prompt(sequences)
        number = len(sums)
        random = np.random.default_rng([seed, number])
        at_once = max(1, _AT_ONCE // number)
        drawn = []
        for start in range(0, resamples, at_once):
            rows = min(at_once, resamples - start)
            picks = random.integers(number, size=(rows, number)) + number * np.arange(rows)[:, None]
            times = np.bincount(picks.ravel(), minlength=rows * number).reshape(rows, number)
            drawn.append(times @ sums)
        together = _Sums(*np.concatenate(drawn).T)
        found[name] = {statistic: value(together) for statistic, value in STATISTICS.items()}
    return found


def measure(
    pairs: Mapping[str, Sequences], drawn: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, Interval]]:
    """Pair -> statistic -> its value with an interval."""
    found: dict[str, dict[str, Interval]] = {}
    for name, sequences in pairs.items():
        sums = _Sums(*_by_prompt(sequences).sum(0))
        found[name] = {
            statistic: _interval(float(value(sums)), drawn[name][statistic]) for statistic, value in STATISTICS.items()
        }
    return found


def factors(
    base: str, measured: Mapping[str, Mapping[str, Interval]], drawn: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, Interval]]:
    """Other pair -> statistic -> by how much that of ``base`` is larger; nan where the other's may be 0 or below."""
    found: dict[str, dict[str, Interval]] = {}
    for name in measured:
        if name == base:
            continue
        found[name] = {}
        for statistic in FACTORS:
            below, above = measured[name][statistic], measured[base][statistic]
            # A quotient by what may as well be 0 has no meaning, and its interval none that a reader would expect.
            if not below.value > 0 or below.low <= 0:
                found[name][statistic] = Interval(np.nan, np.nan, np.nan)
                continue
            found[name][statistic] = _interval(
                above.value / below.value, drawn[base][statistic] / drawn[name][statistic]
            )
    return found


def _interval(value: float, samples: np.ndarray) -> Interval:
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
