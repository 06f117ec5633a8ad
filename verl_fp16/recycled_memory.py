"""Memory that tensors which follow each other take in turns; pure torch.

On a CPU the system clears the pages that a process asks for, and takes them back when they are let go. For a tensor of
some megabytes that is slower than to cast a whole one into it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch


class RecycledMemory:
    """Gives tensors on the CPU the memory of earlier ones, once nothing of these, no view either, is left.

    What it keeps for that is as much as was in use at once, and at most as many blocks of the largest size.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor, not initialised, aligned as torch aligns its own."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        block = self._block(count * dtype.itemsize)
        # A tensor's storage holds what it was made of: when that goes, so has the last tensor that shared it.
        lease = memoryview(block.numpy())
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype, count=count).view(tuple(shape))

    def _block(self, size: int) -> torch.Tensor:
        fitting = [index for index, block in enumerate(self._free) if len(block) >= size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: len(self._free[index])))
        if self._free:
            self._free.pop()  # makes room for the larger one
        return torch.empty(size, dtype=torch.uint8)
