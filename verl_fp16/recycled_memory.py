"""Memory that tensors which follow each other take in turns; pure torch.

On a CPU the system clears the pages that a process asks for, and takes them back when they are let go. For a tensor of
some megabytes that is slower than to cast a whole one into it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch

_KEPT = 3


class RecycledMemory:
    """Gives tensors on the CPU the memory of earlier ones, once nothing of these, no view either, is left.

    Three free blocks are kept at most, and a tensor gets none that is more than twice its size. For one thread at a
    time. The tensors' storages cannot be resized; torch makes them by way of numpy.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self.scratch: torch.Tensor | None = None
        """For who wants to keep one more tensor with it; not touched here."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor, not initialised, aligned as torch aligns its own."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        block = self._block(count * dtype.itemsize)
        # A tensor's storage holds what it was made of: when that goes, so has the last tensor that shared it.
        lease = memoryview(block.numpy())
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype, count=count).view(tuple(shape))

    def _block(self, size: int) -> torch.Tensor:
        self._free.sort(key=len)
        del self._free[:-_KEPT]
        for index, block in enumerate(self._free):
            if size <= len(block) <= 2 * size:
                return self._free.pop(index)
        if len(self._free) == _KEPT:
            del self._free[0]
        return torch.empty(size, dtype=torch.uint8, device="cpu")
