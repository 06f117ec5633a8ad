"""The gap of one batch, with what it was measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from verl_fp16.mismatch.evidence import Evidence, collect
from verl_fp16.mismatch.statistics import GapStatistics, Rows

Curves = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class MeasuredGap:
    """Statistics of a batch and references to its tensors, all of shape (sequences, positions).

    Attributes:
        statistics: what was taken in.
        rows: the sequences' log-ratios and lengths.
        rollout: log mu.
        training: log pi.
        mask: nonzero where a token of the response is.
        tokens: the response's token ids, int64.
        ids: verl's name of each sequence; None where they were not at hand.
    """

    statistics: GapStatistics
    rows: Rows
    rollout: torch.Tensor
    training: torch.Tensor
    mask: torch.Tensor
    tokens: torch.Tensor
    ids: Sequence[str] | None = None

    @classmethod
    def of(
        cls,
        rollout: torch.Tensor,
        training: torch.Tensor,
        mask: torch.Tensor,
        tokens: torch.Tensor,
        ids: Sequence[str] | None = None,
    ) -> MeasuredGap:
        """Measure one batch; on a device nothing is waited for."""
        statistics = GapStatistics(rollout.device)
        return cls(statistics, statistics.add(rollout, training, mask), rollout, training, mask, tokens, ids)

    def evidence(
        self, max_tokens: int, max_sequences: int, *, rank: int = 0, first_row: int = 0
    ) -> tuple[Evidence, Curves]:
        """The worst tokens and the sequences, and the gap by position and length; waits for the device.

        Args:
            max_tokens: the most tokens to keep.
            max_sequences: the most sequences to keep.
            rank: of this process.
            first_row: the number of the first row here among those of this rank.
        """
        tensors = self.rollout, self.training, self.mask, self.tokens
        bounds = {"max_tokens": max_tokens, "max_sequences": max_sequences}
        found = collect(*tensors, self.rows, **bounds, ids=self.ids, rank=rank, first_row=first_row)
        return found, self.statistics.curves()
