"""Digests of tensors: 64 bits that tell whether two processes hold the same bits.

Both are sums modulo 2^64 of a word for each element, computed in chunks where the tensor is; no temporary is larger
than a few chunks (but for a strided tensor of one dimension, which is copied). They are checks against faults, not
against forgery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch

_BLOCK = 2**18  # elements, of the stream digest's definition
_CHUNK = 2**18  # elements: what a CPU's second-level cache holds
_DEVICE_CHUNK = 2**22  # hides the start of a kernel; 32 MB of int64
_MASK = 2**64 - 1
# Odd, from the fraction of the golden ratio and from splitmix64 (Steele et al., 2014), as int64.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stream_digest(tensor: torch.Tensor) -> torch.Tensor:
    """A digest in which every position counts differently: another bit and elements that changed places show.

    Element i contributes ``bits_i * w_i`` modulo 2^64, with the bits as an unsigned number and ``w_i`` odd and
    irregular: ``base[i % B] * factor[i // B]`` for blocks of ``B`` elements. A single changed element always shows;
    that several changes, such as exchanged elements, rows or blocks, cancel each other takes chance (2^-32 or less).

    Args:
        tensor: any shape and dtype; elements count in the order of ``tensor.reshape(-1)``.

    Returns:
        an int64 scalar on the tensor's device; the host does not wait for it.
    """
    return _sum(tensor, lambda bits, first: bits * _positions(bits.numel(), first, bits.device))


def additive_digest(tensor: torch.Tensor) -> torch.Tensor:
    """A digest that does not depend on the order: that of a whole is the sum of those of its parts, modulo 2^64.

    Zero (the one without a sign) contributes zero, so that padding does not show. Every other pattern of bits
    contributes a scrambled word of its own, so that changed elements do not cancel each other but by chance (2^-64).

    Args:
        tensor: any shape and dtype. The digest belongs to the dtype too: compare tensors of one dtype.

    Returns:
        an int64 scalar on the tensor's device; the host does not wait for it.
    """
    return _sum(tensor, lambda bits, first: _scrambled(bits))


def as_unsigned(digest: torch.Tensor | int) -> int:
    """The digest as a number from 0 to 2^64 - 1. Waits for the device."""
    return int(digest) & _MASK


def total(digests: list[int]) -> int:
    """The sum of digests modulo 2^64."""
    return sum(digests) & _MASK


def _sum(tensor: torch.Tensor, words: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    result = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first, chunk in _chunks(tensor.detach()):
        result += words(_as_numbers(chunk), first).sum()
    return result


def _chunks(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first element, flat chunk) of all elements; a strided tensor is copied part by part."""
    size = _chunk_size(tensor.device)
    if not tensor.is_contiguous() and tensor.dim() > 1 and tensor.numel() > size:
        row = tensor[0].numel()
        step = max(1, size // row)
        for start in range(0, len(tensor), step):
            part = tensor[start : start + step]
            for first, chunk in _chunks(part[0] if step == 1 else part):
                yield start * row + first, chunk
        return
    flat = tensor.reshape(-1)
    for first in range(0, flat.numel(), size):
        yield first, flat[first : first + size]


def _chunk_size(device: torch.device) -> int:
    return _CHUNK if device.type == "cpu" else _DEVICE_CHUNK


def _as_numbers(chunk: torch.Tensor) -> torch.Tensor:
    """The bits of each element as an int64 that is not negative (of 8-byte elements: as they are)."""
    size = chunk.element_size()
    bits = chunk.contiguous().view(_BITS[size]).to(torch.int64)
    return bits if size == 8 else bits & ((1 << 8 * size) - 1)


def _positions(count: int, first: int, device: torch.device) -> torch.Tensor:
    """``w_i`` for ``count`` elements from ``first`` on."""
    parts = []
    while count:
        block, offset = divmod(first, _BLOCK)
        taken = min(count, _BLOCK - offset)
        base = _base(str(device))[offset : offset + taken]
        parts.append(base * _factor(block) if block else base)
        first, count = first + taken, count - taken
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@cache
def _base(device: str) -> torch.Tensor:
    return _scrambled(torch.arange(1, _BLOCK + 1, device=device) * _STEP) | 1


@cache
def _factor(block: int) -> int:
    return int(_scrambled(torch.tensor(_wrapped((block + _BLOCK) * _STEP), device="cpu"))) | 1


def _scrambled(bits: torch.Tensor) -> torch.Tensor:
    """The mixer of splitmix64 without its start value, so that 0 stays 0; its shifts drop the sign's copies."""
    words = bits * _MIX[0]
    words ^= (words >> 29) & (2**35 - 1)
    words *= _MIX[1]
    words ^= (words >> 32) & (2**32 - 1)
    return words


def _wrapped(number: int) -> int:
    number &= _MASK
    return number - 2**64 if number >= 2**63 else number
