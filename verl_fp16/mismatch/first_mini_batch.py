"""The gap in the training forward of a training step's first mini-batch, before its update moves the weights.

Where verl takes the rollout's log-probabilities for those of the old policy (bypass mode), no other pass computes the
training policy's, and its own gap reads 0. Pure torch.
"""

from __future__ import annotations

from typing import Any

import torch

from verl_fp16.mismatch.evidence import Evidence
from verl_fp16.mismatch.measured import Curves, MeasuredGap
from verl_fp16.mismatch.statistics import GapStatistics
from verl_fp16.ranks import rank_and_world_size


class FirstMiniBatch:
    """Measures the first mini-batch of each training step on one rank, and counts what is not finite in all of them.

    Attributes:
        measured: its micro-batches, kept until the next training step's first one begins.
    """

    def __init__(self) -> None:
        self.measured: list[MeasuredGap] = []
        self.running = False
        self._next_is_first = True
        self._whole = GapStatistics()
        self._nonfinite: list[torch.Tensor] = []

    def begin(self) -> None:
        """A mini-batch begins."""
        self.running = self._next_is_first
        if self.running:
            self.measured = []

    def take(self, rollout: torch.Tensor, training: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> None:
        """Take in a micro-batch of the first mini-batch; all of shape (sequences, positions), on one device."""
        self.measured.append(MeasuredGap.of(rollout, training, mask, tokens))
        self.count(rollout, mask)

    def count(self, rollout: torch.Tensor, mask: torch.Tensor) -> None:
        """Count the tokens of a micro-batch whose log mu is not finite; both of one shape, on one device."""
        self._nonfinite.append(((mask != 0) & ~torch.isfinite(rollout)).sum())

    def end(self, last: bool, group: Any = None) -> dict[str, float]:
        """The mini-batch has ended.

        Args:
            last: whether it was the training step's last one.
            group: of the ranks that share the mini-batch. Every one of them has to call this.

        Returns:
            the statistics of the first mini-batch over all ranks, the same on each; nothing after any other.
        """
        was_first, self.running, self._next_is_first = self.running, False, last
        if not (was_first and self.measured):
            return {}
        self._whole = self._merged(group)
        return self._whole.scalars()

    def take_nonfinite(self, group: Any = None) -> float:
        """How many were counted since the last call, over all ranks, each of which has to call this."""
        counted, self._nonfinite = self._nonfinite, []
        if not counted:
            return 0.0
        device = self.measured[0].rollout.device if self.measured else counted[0].device
        total = torch.stack([number.to(device) for number in counted]).sum()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total, group=group)
        return float(total)

    def evidence(self, max_tokens: int, max_sequences: int) -> tuple[Evidence, Curves]:
        """The worst tokens and the sequences of this rank, and the curves over all ranks; waits for the device."""
        rank, row, parts = rank_and_world_size()[0], 0, []
        for part in self.measured:
            parts.append(part.evidence(max_tokens, max_sequences, rank=rank, first_row=row)[0])
            row += len(part.rollout)
        return parts[0].merge(parts[1:]), self._whole.curves()

    def _merged(self, group: Any) -> GapStatistics:
        whole = GapStatistics(self.measured[0].rollout.device)
        for part in self.measured:
            whole.merge(part.statistics)
        return whole.all_reduce(group) if torch.distributed.is_initialized() else whole
