"""The gap of one batch, with what it was measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from verl_fp16.mismatch.statistics import GapStatistics, Rows


@dataclass(frozen=True)
class MeasuredGap:
    """Statistics of a batch and references to its tensors, all of shape (sequences, positions).

    Attributes:
        statistics: what was taken in.
        rows: the sequences' log-ratios and lengths.
        rollout: log mu.
        training: log pi.
        mask: nonzero where a token of the response is.
        tokens: the response's token ids; None where they were not at hand.
        ids: verl's name of each sequence; None where they were not at hand.
    """

    statistics: GapStatistics
    rows: Rows
    rollout: torch.Tensor
    training: torch.Tensor
    mask: torch.Tensor
    tokens: torch.Tensor | None = None
    ids: Sequence[str] | None = None

    @classmethod
    def of(
        cls,
        rollout: torch.Tensor,
        training: torch.Tensor,
        mask: torch.Tensor,
        tokens: torch.Tensor | None = None,
        ids: Sequence[str] | None = None,
    ) -> MeasuredGap:
        """Measure one batch; on a device nothing is waited for."""
        statistics = GapStatistics(rollout.device)
        return cls(statistics, statistics.add(rollout, training, mask), rollout, training, mask, tokens, ids)
