"""Evidence of the gap: the tokens on which rollout and training policy differ most, and the sequences' log-ratios.

:func:`collect` and :func:`collect_packed` take what :class:`verl_fp16.mismatch.statistics.GapStatistics` has taken in,
one pass with temporaries of a few MB. Evidence of micro-batches and ranks merges, in any order, into that of the whole.
Pure torch and numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from verl_fp16.mismatch.statistics import LARGEST, Rows

BEFORE, AFTER = 16, 8
"""The most response tokens of the context on either side of a token."""

_CHUNK = 2**17  # elements: a chunk's temporaries are a few MB, and stay in the processor's caches
_DEVICE_CHUNK = 2**22


class WorstToken(NamedTuple):
    """A token of a response.

    Args:
        rank: of the process that saw it.
        row: its sequence, counted over what that rank collected.
        sample_id: the sequence's name, None where none was given.
        position: in the response, from 0 on.
        length: tokens of the sequence that count: of the mask, with finite log-probabilities.
        token_id: the token.
        before: ids of up to 16 tokens of the mask that precede it, nearest last; what the mask lacks is passed over.
        after: ids of up to 8 that follow.
        log_mu: of the rollout policy, nats; may be infinite or nan.
        log_pi: of the training policy, likewise.
    """

    rank: int
    row: int
    sample_id: str | None
    position: int
    length: int
    token_id: int
    before: list[int]
    after: list[int]
    log_mu: float
    log_pi: float

    @property
    def log_ratio(self) -> float:
        """log pi - log mu, nats; not finite where one of them is not."""
        return self.log_pi - self.log_mu

    @property
    def gap(self) -> float:
        """|log mu - log pi|, nats; infinite where one of them is not finite."""
        # Not abs(log_ratio) <= LARGEST alone: two values may be out of range and their difference in it.
        finite = max(abs(self.log_mu), abs(self.log_pi), abs(self.log_ratio)) <= LARGEST
        return abs(self.log_ratio) if finite and not math.isnan(self.log_ratio) else math.inf


class SequenceRatio(NamedTuple):
    """A sequence with at least one token that counts: rank, row, name and length as in :class:`WorstToken`.

    Args:
        log_ratio: sum of log pi - log mu over its tokens that count, nats.
    """

    rank: int
    row: int
    sample_id: str | None
    length: int
    log_ratio: float


@dataclass(frozen=True)
class Evidence:
    """What was worst, bounded; can be pickled.

    Args:
        max_tokens: the most tokens that are kept.
        max_sequences: the most sequences that are kept.
        tokens: those with the largest gap; first the ones with a log-probability that is not finite, then by falling
            gap; ties by rank, row, position.
        sequences: by rank and row. Of more than ``max_sequences``, the rows that come first when the bits of the row
            number are read backwards: they are spread evenly over the batch, whatever their length and log-ratio, and
            parts of a batch agree on them.
        tokens_seen: tokens that count, in all that was collected.
        sequences_seen: sequences with at least one of them.
    """

    max_tokens: int
    max_sequences: int
    tokens: list[WorstToken]
    sequences: list[SequenceRatio]
    tokens_seen: int
    sequences_seen: int

    def merge(self, others: Iterable[Evidence]) -> Evidence:
        """Evidence of everything that this and ``others`` are of; the smallest bounds hold.

        No two of them may have a row of the same rank and number: see ``first_row`` of :func:`collect`.
        """
        parts = [self, *others]
        return _bounded(
            min(part.max_tokens for part in parts),
            min(part.max_sequences for part in parts),
            [token for part in parts for token in part.tokens],
            [sequence for part in parts for sequence in part.sequences],
            sum(part.tokens_seen for part in parts),
            sum(part.sequences_seen for part in parts),
        )


def collect(
    rollout: torch.Tensor,
    training: torch.Tensor,
    mask: torch.Tensor,
    tokens: torch.Tensor,
    rows: Rows,
    *,
    max_tokens: int,
    max_sequences: int,
    ids: Sequence[str] | None = None,
    rank: int = 0,
    first_row: int = 0,
) -> Evidence:
    """Collect from whole sequences with padding. Waits for the device.

    Args:
        rollout: log mu, floating, of shape (sequences, positions).
        training: log pi, same shape.
        mask: true or nonzero where a token of the response is, same shape.
        tokens: response token ids, int64, same shape.
        rows: what :meth:`GapStatistics.add` returned for these tensors.
        max_tokens: the most tokens to keep.
        max_sequences: the most sequences to keep.
        ids: a name for each sequence.
        rank: of this process.
        first_row: the number of the first row: how many rows earlier calls on this rank have had.

    Raises:
        ValueError: shapes or numbers of sequences differ, or a bound is negative.
    """
    if rollout.dim() != 2 or not rollout.shape == training.shape == mask.shape == tokens.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (rollout, training, mask, tokens))
        raise ValueError(
            f"rollout, training, mask and tokens must be of one shape (sequences, positions), got {shapes}"
        )
    _check(len(rollout), rows, ids, max_tokens, max_sequences)
    flat, mu, pi = _worst(rollout, training, mask, max_tokens)
    row, position = np.divmod(flat, max(1, rollout.shape[1]))
    worst = _with_context(row, position, mu, pi, rows, ids, rank, first_row, lambda row: (mask[row], tokens[row]))
    return _evidence(worst, rows, ids, rank, first_row, max_tokens, max_sequences)


def collect_packed(
    rollout: torch.Tensor,
    training: torch.Tensor,
    mask: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    rows: Rows,
    *,
    max_tokens: int,
    max_sequences: int,
    ids: Sequence[str] | None = None,
    rank: int = 0,
    first_row: int = 0,
) -> Evidence:
    """Collect from sequences that follow each other without padding; otherwise as :func:`collect`.

    Args:
        rollout: log mu of shape (tokens,); so are ``training``, ``mask`` and ``tokens``.
        offsets: int64 of shape (sequences + 1,): where each begins and the last ends, from 0 on.
        rows: what :meth:`GapStatistics.add_packed` returned for these tensors.

    Raises:
        ValueError: as :func:`collect`; or ``offsets`` do not begin with 0 or end with the number of tokens.
    """
    if rollout.dim() != 1 or not rollout.shape == training.shape == mask.shape == tokens.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (rollout, training, mask, tokens))
        raise ValueError(f"rollout, training, mask and tokens must be of one shape (tokens,), got {shapes}")
    starts = offsets.cpu().numpy()
    if not len(starts) or starts[0] != 0 or starts[-1] != len(rollout):
        raise ValueError(f"offsets must begin with 0 and end with {len(rollout)}, the number of tokens")
    _check(len(starts) - 1, rows, ids, max_tokens, max_sequences)
    flat, mu, pi = _worst(rollout, training, mask, max_tokens)
    row = np.searchsorted(starts, flat, side="right") - 1

    def of_row(row: int) -> tuple[torch.Tensor, torch.Tensor]:
        here = slice(starts[row], starts[row + 1])
        return mask[here], tokens[here]

    worst = _with_context(row, flat - starts[row], mu, pi, rows, ids, rank, first_row, of_row)
    return _evidence(worst, rows, ids, rank, first_row, max_tokens, max_sequences)


def _check(sequences: int, rows: Rows, ids: Sequence[str] | None, *bounds: int) -> None:
    if len(rows.length) != sequences or (ids is not None and len(ids) != sequences):
        named = "" if ids is None else f" and {len(ids)} ids"
        raise ValueError(f"there are {sequences} sequences, and rows of {len(rows.length)}{named}")
    if min(bounds) < 0:
        raise ValueError(f"max_tokens and max_sequences must not be negative, got {bounds[0]} and {bounds[1]}")


@torch.no_grad()
def _worst(
    rollout: torch.Tensor, training: torch.Tensor, mask: torch.Tensor, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat indices, ascending, of the ``most`` tokens of the mask with the largest gap, and their log mu and log pi.

    Of tokens with the same gap the first ones are taken: the pass is in their order, and a later one has to be worse
    than all that are held, not as bad.
    """
    flat = torch.empty(0, dtype=torch.int64, device=rollout.device)
    mus, pis, gaps = torch.empty(3, 0, dtype=torch.float64, device=rollout.device)
    width = rollout.shape[1] if rollout.dim() == 2 else 1
    chunk = _CHUNK if rollout.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, chunk // max(1, width))
    wide = torch.float64 in (rollout.dtype, training.dtype)
    least = -math.inf if most else math.inf
    for start in range(0, len(rollout), step):
        if least == math.inf:
            break  # nothing is worse than a token that is not finite
        part = slice(start, start + step)
        mu, pi = rollout[part].double(), training[part].double()
        gap = (mu - pi).abs_()
        if wide:  # the difference of two that count as not finite may be small
            gap.masked_fill_(~((mu.abs() <= LARGEST) & (pi.abs() <= LARGEST)), math.inf)
        worse = ~(gap <= least)  # nan is
        worse &= mask[part] != 0
        index = worse.flatten().nonzero()[:, 0]
        if not len(index):
            continue
        gap, mu, pi = (values.flatten()[index] for values in (gap, mu, pi))
        gap.masked_fill_(~(gap <= LARGEST), math.inf)
        held = tuple(torch.cat(pair) for pair in ((flat, index + start * width), (mus, mu), (pis, pi), (gaps, gap)))
        if len(held[-1]) > most:
            keep = _largest(held[-1], most)
            held = tuple(values[keep] for values in held)
        flat, mus, pis, gaps = held
        if len(gaps) == most:
            least = gaps.amin().item()
    return flat.cpu().numpy(), mus.cpu().numpy(), pis.cpu().numpy()


def _largest(values: torch.Tensor, most: int) -> torch.Tensor:
    """A mask of the ``most`` largest of them; of equal ones, the first."""
    least = torch.topk(values, most, sorted=False).values.amin()
    keep = values > least
    equal = (values == least).nonzero()[:, 0]
    keep[equal[: most - int(keep.sum())]] = True
    return keep


def _with_context(
    rows_of: np.ndarray,
    positions: np.ndarray,
    mus: np.ndarray,
    pis: np.ndarray,
    rows: Rows,
    ids: Sequence[str] | None,
    rank: int,
    first_row: int,
    of_row: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
) -> list[WorstToken]:
    """The tokens at these places, which are in the order of their rows: one row at a time is looked at."""
    found, current = [], -1
    for row, position, mu, pi in zip(rows_of.tolist(), positions.tolist(), mus.tolist(), pis.tolist(), strict=True):
        if row != current:
            current, (mask, tokens) = row, of_row(row)
            kept = (mask != 0).cpu().numpy()
            places, here = kept.nonzero()[0], tokens.cpu().numpy()[kept].tolist()
            length = int(rows.length[row])
        at = int(np.searchsorted(places, position))
        context = here[max(0, at - BEFORE) : at], here[at + 1 : at + 1 + AFTER]
        name = None if ids is None else ids[row]
        found.append(WorstToken(rank, first_row + row, name, position, length, here[at], *context, mu, pi))
    return found


def _evidence(
    worst: list[WorstToken],
    rows: Rows,
    ids: Sequence[str] | None,
    rank: int,
    first_row: int,
    max_tokens: int,
    max_sequences: int,
) -> Evidence:
    s, length = rows.s.cpu().numpy(), rows.length.cpu().numpy()
    some = length.nonzero()[0]
    chosen = some[_evenly(first_row + some, max_sequences)]
    sequences = [
        SequenceRatio(rank, first_row + row, None if ids is None else ids[row], int(length[row]), float(s[row]))
        for row in chosen.tolist()
    ]
    return _bounded(max_tokens, max_sequences, worst, sequences, int(length.sum()), len(some))


def _bounded(
    max_tokens: int,
    max_sequences: int,
    tokens: list[WorstToken],
    sequences: list[SequenceRatio],
    tokens_seen: int,
    sequences_seen: int,
) -> Evidence:
    worst = sorted(tokens, key=lambda token: (-token.gap, token.rank, token.row, token.position))[:max_tokens]
    ordered = sorted(sequences, key=lambda sequence: (sequence.rank, sequence.row))
    chosen = _evenly(np.array([sequence.row for sequence in ordered], dtype=np.int64), max_sequences)
    kept = [ordered[index] for index in chosen.tolist()]
    return Evidence(max_tokens, max_sequences, worst, kept, tokens_seen, sequences_seen)


def _evenly(numbers: np.ndarray, most: int) -> np.ndarray:
    """Indices, ascending, of the ``most`` numbers that come first with their bits read backwards (van der Corput).

    The first 2^k numbers in this order are 2^-k of the range apart from each other, and whether a number is among the
    first ones does not depend on how the numbers were split before: a sample of samples is that of the whole.
    """
    if len(numbers) <= most:
        return np.arange(len(numbers))
    bits = np.unpackbits(numbers.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    backwards = np.packbits(bits[:, ::-1], axis=1).view(">u4")[:, 0]
    return np.sort(np.argsort(backwards, kind="stable")[:most])
