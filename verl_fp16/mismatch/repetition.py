"""Responses that got stuck on one token, as "!!!!": where logits are NaN, a sampler picks the same token for ever."""

from __future__ import annotations

import torch

_CHUNK = 2**22  # elements that are looked at one by one at a time: some 100 MB of temporaries


def rows_with_runs(tokens: torch.Tensor, mask: torch.Tensor, length: int) -> int:
    """The number of rows that :func:`find_runs` finds."""
    return len(find_runs(tokens, mask, length))


def find_runs(tokens: torch.Tensor, mask: torch.Tensor, length: int) -> dict[int, int]:
    """Row -> token of its first run, of every row with a run of one token; rows ascend.

    A run is ``length`` or more positions next to each other, all in the mask, with the same token. Only every
    ``length // 2``-th position is read of rows in which no two of these that are neighbours are equal.

    Args:
        tokens: integers of shape (rows, positions).
        mask: true or nonzero where a token of the response is, same shape.
        length: positions, at least 2.

    Raises:
        ValueError: shapes differ, are not of two dimensions, or ``length`` is below 2.
    """
    if tokens.dim() != 2 or tokens.shape != mask.shape:
        shapes = f"{tuple(tokens.shape)}, {tuple(mask.shape)}"
        raise ValueError(f"tokens and mask must be of one shape (rows, positions), got {shapes}")
    if length < 2:
        raise ValueError(f"a run has at least 2 positions, got length={length}")
    found: dict[int, int] = {}
    suspects = _suspects(tokens, mask, length // 2)
    if not len(suspects):
        return found
    for rows in suspects.split(max(1, _CHUNK // max(1, tokens.shape[1]))):
        some = tokens[rows]
        kept = mask[rows] != 0
        same = (some[:, 1:] == some[:, :-1]) & kept[:, 1:] & kept[:, :-1]
        positions = torch.arange(same.shape[1], dtype=torch.int32)
        since = positions - torch.where(same, -1, positions).cummax(1).values  # pairs in a row that are the same
        long = since >= length - 1
        stuck = long.any(1)
        first = long[stuck].int().argmax(1)
        of_run = some[stuck].gather(1, first[:, None])[:, 0]
        found.update(zip(rows[stuck].tolist(), of_run.tolist(), strict=True))
    return found


def _suspects(tokens: torch.Tensor, mask: torch.Tensor, step: int) -> torch.Tensor:
    """Rows that are equal from one sampled position to the next, every ``step``-th, both of them in the mask.

    A run of ``2 * step`` or more positions holds two neighbouring samples and all between them, so none is missed.
    """
    sampled = tokens[:, ::step]
    kept = mask[:, ::step] != 0
    rows, starts = ((sampled[:, 1:] == sampled[:, :-1]) & kept[:, 1:] & kept[:, :-1]).nonzero(as_tuple=True)
    # Frequent tokens are equal by chance in most long rows: what lies between tells those from runs.
    hits = []
    between = torch.arange(step)
    for part in torch.arange(len(rows)).split(max(1, _CHUNK // step)):
        some = tokens[rows[part, None], starts[part, None] * step + between]
        hits.append(rows[part][(some == some[:, :1]).all(1)])
    return torch.cat(hits).unique() if hits else rows
