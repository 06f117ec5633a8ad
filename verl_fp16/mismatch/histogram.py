"""A histogram of magnitudes with fixed bins of 1/64 of an octave: quantiles within 1%, merged by addition; pure torch.

The bin of a number is the upper part of its float32 pattern, whose exponent is a logarithm already: 64 bins to each
power of two, of equal width within it, so that the middle of a bin is at most 1/128 away from what is in it.
"""

from __future__ import annotations

import math

import torch

_DROPPED_BITS = 17  # of the mantissa's 23
BINS = 2 ** (31 - _DROPPED_BITS)


def count_magnitudes(magnitudes: torch.Tensor, may_read: bool = True) -> torch.Tensor:
    """How many numbers fall into each bin.

    Args:
        magnitudes: flat, floating, >= 0, finite.
        may_read: whether the host may wait for the device.

    Returns:
        int64 of shape (BINS,) on the same device.
    """
    bins = magnitudes.float().view(torch.int32) >> _DROPPED_BITS
    if may_read:
        return torch.bincount(bins, minlength=BINS)
    # bincount asks the device for the largest bin.
    counts = torch.zeros(BINS, dtype=torch.int64, device=magnitudes.device)
    return counts.index_add_(0, bins, torch.ones_like(bins, dtype=torch.int64))


def quantile(counts: torch.Tensor, share: float) -> float:
    """The smallest magnitude that at least ``share`` of the numbers do not exceed, within 1% of itself.

    Numbers below 1.2e-38, where float32's own steps are coarser, are only near; from 3.4e38 on it is inf. 0 without
    any.

    Args:
        counts: of :func:`count_magnitudes`, or a sum of such.
        share: in (0, 1].
    """
    below = counts.cpu().cumsum(0)
    total = int(below[-1])
    if total == 0:
        return 0.0
    rank = min(max(1, math.ceil(share * total)), total)
    index = int(torch.searchsorted(below, rank))
    if index == 0:
        return 0.0  # what is not zero there is less than 1e-40
    edges = torch.tensor([index, index + 1], dtype=torch.int32) << _DROPPED_BITS
    low, high = edges.view(torch.float32).double().tolist()
    return (low + high) / 2 if high < math.inf else math.inf
