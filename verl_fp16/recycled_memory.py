"""Memory that tensors which follow each other take in turns; pure torch.

On a CPU the system clears the pages that a process asks for, and takes them back when they are let go. For a tensor of
some megabytes that is slower than to cast a whole one into it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch

_KEPT = 4


class RecycledMemory:
    """Gives tensors on the CPU the memory of earlier ones, once nothing of these, no view either, is left.

    The four largest free blocks are kept, and a tensor gets none that is more than twice its size. For one thread at
    a time. The tensors' storages cannot be resized; torch makes them by way of numpy.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []  # by size

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor, not initialised, aligned as torch aligns its own."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        block = self._block(count * dtype.itemsize)
        # A tensor's storage holds what it was made of: when that goes, so has the last tensor that shared it.
        lease = memoryview(block.numpy())
        weakref.finalize(lease, self._take_back, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype, count=count).view(tuple(shape))

    def _block(self, size: int) -> torch.Tensor:
        for block in self._free:
            if size <= len(block) <= 2 * size:
                self._free = [other for other in self._free if other is not block]
                return block
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def _take_back(self, block: torch.Tensor) -> None:
        # May run in the middle of _block, which then goes on with the list that it has.
        self._free = sorted([*self._free, block], key=len)[-_KEPT:]
