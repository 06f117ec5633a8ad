"""Statistics of the gap between rollout policy mu and training policy pi, on the tokens that mu sampled; pure torch.

:class:`GapStatistics` takes log-probabilities in any number of calls, one pass over each, and holds sums, extremes and
histograms of a fixed size: those of parts, micro-batches and ranks merge into those of the whole, in any order.
What each statistic means is written in :mod:`verl_fp16.mismatch.definitions`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from verl_fp16.mismatch.definitions import CUT, Totals, scalars
from verl_fp16.mismatch.histogram import BINS, count_magnitudes

LARGEST = 1e100
"""Log-probabilities of a larger magnitude count as not finite, so that squares of their sums are finite."""

_CHUNK = 2**17  # elements: a chunk's temporaries are a few MB, and stay in the processor's caches
_DEVICE_CHUNK = 2**22
_CURVE_BINS = 8 * 32  # of positions and lengths: eight to an octave, up to 2^32

_SUMS = (
    *("tokens", "rows", "sequences", "bad_rollout", "bad_training"),
    *("d", "abs", "square", "k3", "ratio", "ratio_square", "multiplied", "js", "outside"),
    *("mu", "pi", "mu_square", "pi_square", "mu_pi", "prob_abs"),
    *("length", "length_square", "s", "s_square", "s_length", "weight", "weight_square"),
)
_INDEX = {name: index for index, name in enumerate(_SUMS)}
_MAXIMA = ("abs", "prob", "minus_prob", "s", "minus_s")
_CURVES = ("tokens", "d", "abs")
_LENGTH_CURVES = ("sequences", "length", "s", "s_square")


@dataclass(frozen=True)
class Rows:
    """What was added, row by row, float64: ``s``, the sum of log pi - log mu; ``length``, the tokens that count."""

    s: torch.Tensor
    length: torch.Tensor


class GapStatistics:
    """Accumulates the gap's statistics.

    Args:
        device: where sums are held and inputs are; nothing is read from it before :meth:`scalars` or :meth:`curves`.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        # A look at a number costs nothing on a CPU; elsewhere the host would wait for it.
        self._reads = self.device.type == "cpu"
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._maxima = torch.full((len(_MAXIMA),), -math.inf, dtype=torch.float64, device=device)
        self._histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._by_position = torch.zeros(len(_CURVES), _CURVE_BINS, dtype=torch.float64, device=device)
        self._by_length = torch.zeros(len(_LENGTH_CURVES), _CURVE_BINS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, rollout: torch.Tensor, training: torch.Tensor, mask: torch.Tensor) -> Rows:
        """Take in whole sequences.

        Args:
            rollout: log mu, floating, of shape (sequences, positions).
            training: log pi, same shape.
            mask: true or nonzero where a token of the response is, same shape.

        Raises:
            ValueError: shapes differ, or are not of two dimensions.
        """
        if rollout.dim() != 2 or not rollout.shape == training.shape == mask.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (rollout, training, mask))
            raise ValueError(f"rollout, training and mask must be of one shape (sequences, positions), got {shapes}")
        rows = Rows(*torch.zeros(2, len(rollout), dtype=torch.float64, device=self.device))
        for block, columns in _blocks(rollout.shape, self._chunk()):
            here = rollout[block, columns], training[block, columns], mask[block, columns]
            self._add_block(*here, columns.start, Rows(rows.s[block], rows.length[block]))
        self._add_rows(rows)
        return rows

    @torch.no_grad()
    def add_packed(
        self, rollout: torch.Tensor, training: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor
    ) -> Rows:
        """Take in sequences that follow each other without padding.

        Args:
            rollout: log mu of shape (tokens,).
            training: log pi, same shape.
            mask: as for :meth:`add`, same shape.
            offsets: int64 of shape (sequences + 1,): where each begins and the last ends, from 0 on.

        Raises:
            ValueError: shapes differ; on a CPU also: ``offsets`` do not begin with 0 or end with the number of tokens.
        """
        if rollout.dim() != 1 or not rollout.shape == training.shape == mask.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (rollout, training, mask))
            raise ValueError(f"rollout, training and mask must be of one shape (tokens,), got {shapes}")
        if self._reads and (offsets[0] != 0 or offsets[-1] != len(rollout)):
            raise ValueError(f"offsets must begin with 0 and end with {len(rollout)}, the number of tokens")
        rows = Rows(*torch.zeros(2, len(offsets) - 1, dtype=torch.float64, device=self.device))
        lengths = offsets.diff()
        of_row = torch.repeat_interleave(lengths, output_size=len(rollout))
        position = torch.arange(len(rollout), device=self.device) - offsets[:-1][of_row]
        for start in range(0, len(rollout), self._chunk()):
            part = slice(start, start + self._chunk())
            d, keep = self._judge(rollout[part], training[part], mask[part])
            kept = keep.to(torch.float64)
            rows.s.index_add_(0, of_row[part], d, alpha=-1)
            rows.length.index_add_(0, of_row[part], kept)
            self._by_position.index_add_(1, _curve_bin(position[part]), torch.stack([kept, d, d.abs()]))
            self._add_tokens(d, rollout[part], keep)
        self._add_rows(rows)
        return rows

    def merge(self, other: GapStatistics) -> GapStatistics:
        """Take in what another one has taken in; returns self."""
        for mine, theirs in zip(self._added(), other._added(), strict=True):
            mine += theirs.to(self.device)
        torch.maximum(self._maxima, other._maxima.to(self.device), out=self._maxima)
        return self

    def all_reduce(self, group: object | None = None) -> GapStatistics:
        """Merge over the ranks of a process group; each then holds the whole. Returns self."""
        import torch.distributed as dist

        for tensor in self._added():
            dist.all_reduce(tensor, group=group)
        dist.all_reduce(self._maxima, op=dist.ReduceOp.MAX, group=group)
        return self

    def totals(self) -> Totals:
        """What was taken in so far; waits for the device."""
        numbers = dict(zip(_SUMS, self._sums.tolist(), strict=True))
        maxima = dict(zip(_MAXIMA, self._maxima.tolist(), strict=True))
        return Totals(numbers, maxima, self._histogram.cpu())

    def scalars(self) -> dict[str, float]:
        """Name -> value of every statistic that what was taken in defines; each is finite. Waits for the device."""
        return scalars(self.totals())

    def curves(self) -> dict[str, list[dict[str, float]]]:
        """The gap by position and by length, a row for each bin that has tokens; waits for the device.

        ``position``: rows of ``first`` and ``last`` (positions in the response, from 0 on), ``tokens``, ``k1`` and
        ``log_prob_abs_diff_mean``. ``length``: rows of ``first`` and ``last`` (tokens), ``sequences``, ``length_mean``,
        ``seq_log_ratio_mean`` and ``seq_log_ratio_std`` (of the sequences in the bin, divided by their number).
        """
        positions = [
            {**_edges(index), "tokens": n, "k1": d / n, "log_prob_abs_diff_mean": magnitude / n}
            for index, (n, d, magnitude) in enumerate(zip(*self._by_position.tolist(), strict=True))
            if n
        ]
        lengths = [
            {
                **_edges(index),
                "sequences": n,
                "length_mean": length / n,
                "seq_log_ratio_mean": s / n,
                "seq_log_ratio_std": math.sqrt(max(0.0, square / n - (s / n) ** 2)),
            }
            for index, (n, length, s, square) in enumerate(zip(*self._by_length.tolist(), strict=True))
            if n
        ]
        return {"position": positions, "length": lengths}

    def _added(self) -> tuple[torch.Tensor, ...]:
        return self._sums, self._histogram, self._by_position, self._by_length

    def _chunk(self) -> int:
        return _CHUNK if self._reads else _DEVICE_CHUNK

    def _add_block(
        self, rollout: torch.Tensor, training: torch.Tensor, mask: torch.Tensor, first: int, rows: Rows
    ) -> None:
        d, keep = self._judge(rollout, training, mask)
        rows.s.sub_(d.sum(1))
        rows.length.add_(keep.sum(1))
        positions = torch.arange(first, first + d.shape[1], device=self.device)
        columns = torch.stack([keep.sum(0).to(torch.float64), d.sum(0), d.abs().sum(0)])
        self._by_position.index_add_(1, _curve_bin(positions), columns)
        self._add_tokens(d, rollout, keep)

    def _judge(
        self, rollout: torch.Tensor, training: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``d`` in float64, 0 where a token does not count, and where they do. Counts those that should but cannot."""
        mu, pi, mask = rollout.double(), training.double(), mask != 0
        d = mu - pi
        keep = mask & (d.abs() <= LARGEST)
        if rollout.dtype == torch.float64 or training.dtype == torch.float64:
            keep &= (mu.abs() <= LARGEST) & (pi.abs() <= LARGEST)
        masked, kept = mask.sum(), keep.sum()
        self._add("tokens", kept)
        if not self._reads or masked != kept:
            self._add("bad_rollout", (mask & ~(mu.abs() <= LARGEST)).sum())
            self._add("bad_training", (mask & ~(pi.abs() <= LARGEST)).sum())
            d = d.masked_fill_(~keep, 0.0)
        elif kept != d.numel():
            d = d.masked_fill_(~keep, 0.0)
        return d, keep

    def _add_tokens(self, d: torch.Tensor, rollout: torch.Tensor, keep: torch.Tensor) -> None:
        """Sums over tokens. A CPU picks those that count; elsewhere the others add 0, or what is taken off again."""
        if self._reads:
            d, log_mu, others = d[keep], rollout[keep].double(), 0
        else:
            d, left_out = d.reshape(-1), ~keep.reshape(-1)
            log_mu = rollout.reshape(-1).double().masked_fill(left_out, -math.inf)
            others = left_out.sum()
        if not len(d):
            return
        magnitude = d.abs()
        largest = magnitude.amax()
        cut = d.clamp(-CUT, CUT)
        # exp(|d|) - 1 has all of its digits, whatever |d| is; so have the ratio and the ratio - 1, made of it.
        growth = torch.expm1(cut.abs())
        multiplied = growth + 1
        larger = cut < 0
        ratio = torch.where(larger, multiplied, multiplied.reciprocal())
        excess = torch.where(larger, growth, -growth * ratio)
        mu = log_mu.clamp(max=0).exp_()
        pi = (mu * ratio).clamp_(max=1)
        gap = (mu * excess).clamp_(-1, 1)
        if not self._reads or largest > CUT:
            far = d < -CUT  # there mu times the cut ratio is not pi
            pi = torch.where(far, (log_mu - d).clamp_(max=0).exp_(), pi)
            gap = torch.where(far, pi - mu, gap)
        if not self._reads:
            ratio, multiplied = ratio.masked_fill_(left_out, 0.0), multiplied.masked_fill_(left_out, 0.0)
        self._add("d", d.sum())
        self._add("abs", magnitude.sum())
        self._add("square", d.dot(d))
        self._add("k3", (excess + cut).sum())
        self._add("ratio", ratio.sum())
        self._add("ratio_square", ratio.dot(ratio))
        self._add("multiplied", multiplied.sum())
        self._add("js", torch.log1p(excess * 0.5).sum() + 0.5 * cut.sum())
        self._add("outside", (excess.abs() > 0.1).sum())
        self._add("mu", mu.sum())
        self._add("pi", pi.sum())
        self._add("mu_square", mu.dot(mu))
        self._add("pi_square", pi.dot(pi))
        self._add("mu_pi", mu.dot(pi))
        self._add("prob_abs", gap.abs().sum())
        self._histogram += count_magnitudes(magnitude, self._reads)
        self._histogram[0] -= others
        self._raise("abs", largest)
        if self._reads:
            low, high = torch.aminmax(gap)
        else:
            low = gap.masked_fill(left_out, math.inf).amin()
            high = gap.masked_fill_(left_out, -math.inf).amax()
        self._raise("prob", high)
        self._raise("minus_prob", -low)

    def _add_rows(self, rows: Rows) -> None:
        s, length = rows.s, rows.length
        some = length > 0
        weight = s.clamp(-CUT, CUT).exp().masked_fill(~some, 0.0)
        self._add("rows", torch.tensor(float(len(s))))
        self._add("sequences", some.sum())
        for name, values in {
            "length": length,
            "length_square": length * length,
            "s": s,
            "s_square": s * s,
            "s_length": s * length,
            "weight": weight,
            "weight_square": weight * weight,
        }.items():
            self._add(name, values.sum())
        self._by_length.index_add_(1, _curve_bin(length.long()), torch.stack([some.double(), length, s, s * s]))
        if len(s):
            self._raise("s", s.masked_fill(~some, -math.inf).amax())
            self._raise("minus_s", (-s).masked_fill_(~some, -math.inf).amax())

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[_INDEX[name]] += value

    def _raise(self, name: str, value: torch.Tensor) -> None:
        index = _MAXIMA.index(name)
        torch.maximum(self._maxima[index], value, out=self._maxima[index])


def _blocks(shape: torch.Size, chunk: int) -> Iterator[tuple[slice, slice]]:
    rows, columns = shape
    wide = max(1, min(columns, chunk))
    high = max(1, chunk // wide)
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            yield slice(top, top + high), slice(left, left + wide)


def _edges(index: int) -> dict[str, int]:
    edges = (torch.tensor([index, index + 1], dtype=torch.int32) + (127 << 3) << 20).view(torch.float32)
    first, after = (math.ceil(edge) - 1 for edge in edges.tolist())
    return {"first": first, "last": after - 1}


def _curve_bin(numbers: torch.Tensor) -> torch.Tensor:
    """Eight bins to an octave of ``number + 1``: the upper part of the float32 pattern."""
    return ((numbers + 1).float().view(torch.int32) >> 20) - (127 << 3)
