"""Rounding a tensor to another float dtype, and counting what that did to its values; pure torch.

Numbers are judged by their bits: without the sign, the larger magnitude has the larger pattern, and the exponent of
inf and nan is the largest of all.

* On a CPU a look at a number costs nothing: :func:`tally_on_cpu` looks closer where a chunk asks for it.
* Elsewhere it would make the host wait: :func:`tally_on_device` counts everything, always, and leaves the counts there.

Both work in chunks, so that beside the image no temporary grows with the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from verl_fp16.recycled_memory import RecycledMemory

CPU_CHUNK = 2**20
"""Elements for each thread: image and scratch stay in the processor's caches."""
DEVICE_CHUNK = 2**24
"""Elements: enough to hide the start of the kernels, little beside a model."""

_MOST_THREADS = 16  # bounds the scratch memory
_ROW = 1024  # how closely a chunk is searched
_LANES = 2**14  # 64-bit words in a sum: a lane of 16 bits must not run over


@dataclass(frozen=True)
class CastCounts:
    """What a cast did to the values of a tensor, or of several: ``a + b`` merges, ``CastCounts()`` is neutral.

    Args:
        values: elements.
        overflow: finite values whose image is not finite (in float16: magnitudes from 65520); counted before clamping.
        flushed: values other than zero whose image is zero.
        subnormal: values whose image is subnormal and not zero.
        non_finite: values that were inf or nan before the cast.
        max_abs: the largest finite magnitude before the cast.
    """

    values: int = 0
    overflow: int = 0
    flushed: int = 0
    subnormal: int = 0
    non_finite: int = 0
    max_abs: float = 0.0

    def __add__(self, other: CastCounts) -> CastCounts:
        if not isinstance(other, CastCounts):
            return NotImplemented
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "max_abs"}
        return CastCounts(**sums, max_abs=max(self.max_abs, other.max_abs))


@dataclass(frozen=True)
class _Format:
    """Patterns of a float dtype without the sign, as integers of its width."""

    bits: torch.dtype
    magnitude: int  # the mask that takes the sign away
    infinity: int
    normal: int  # the smallest normal number


def _format(bits: torch.dtype, width: int, mantissa: int) -> _Format:
    magnitude = 2 ** (width - 1) - 1
    return _Format(bits, magnitude, magnitude - (2**mantissa - 1), 2**mantissa)


_FORMATS = {
    torch.float16: _format(torch.int16, 16, 10),
    torch.bfloat16: _format(torch.int16, 16, 7),
    torch.float32: _format(torch.int32, 32, 23),
    torch.float64: _format(torch.int64, 64, 52),
}
DTYPES = tuple(_FORMATS)
"""What can be rounded."""


def empty_image(source: torch.Tensor, dtype: torch.dtype, memory: RecycledMemory | None = None) -> torch.Tensor:
    """Room for the image: ``source``'s shape and device, no gaps, dimensions in ``source``'s order in memory."""
    order = _order(source)
    shape = source.permute(order).shape
    if memory and source.device.type == "cpu":
        room = memory.empty(shape, dtype)
    else:
        room = torch.empty(shape, dtype=dtype, device=source.device)
    return room.permute([order.index(dimension) for dimension in range(source.dim())])


class CastMemory:
    """Memory for casts on the CPU to one dtype, one after the other: of their images, and to work in.

    Args:
        dtype: of the images.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.images = RecycledMemory()
        self._dtype = dtype

    @cached_property
    def scratch(self) -> torch.Tensor:
        """For :func:`tally_on_cpu`."""
        size = CPU_CHUNK * min(torch.get_num_threads(), _MOST_THREADS)
        return torch.empty(size, dtype=_FORMATS[self._dtype].bits, device="cpu")


def tally_on_cpu(source: torch.Tensor, image: torch.Tensor, clamp: bool, room: torch.Tensor) -> CastCounts:
    """Round ``source`` into ``image`` and count.

    Args:
        source: floating, on the CPU.
        image: from :func:`empty_image`, or ``source`` itself, which is then only counted.
        clamp: whether finite values beyond the range become the largest finite number.
        room: :attr:`CastMemory.scratch`; its length is that of a chunk.
    """
    counts = CastCounts()
    for part, rounded in _flat(source, image, len(room)):
        whole = len(part) // _ROW * _ROW
        if whole:
            counts += _tally_rows(part[:whole], rounded[:whole], clamp, room)
        if whole < len(part):
            _round(part[whole:], rounded[whole:])
            counts += _count_now(part[whole:], rounded[whole:], clamp)
    return counts


def _tally_rows(source: torch.Tensor, image: torch.Tensor, clamp: bool, room: torch.Tensor) -> CastCounts:
    """:func:`tally_on_cpu` for flat tensors of whole rows.

    Weights seldom have more to them than subnormal numbers: these are counted everywhere. The rest is looked for in the
    rows whose smallest or largest pattern ask for it: zeros, what is not finite, and, since rounding keeps the order,
    the largest magnitude.
    """
    form = _FORMATS[image.dtype]
    lows, highs = torch.empty(2, len(source) // _ROW, dtype=form.bits, device="cpu")
    tiny = 0
    chunks = (tensor.split(len(room)) for tensor in (source, image, image.view(form.bits)))
    extremes = (tensor.split(len(room) // _ROW) for tensor in (lows, highs))
    for part, rounded, bits, low, high in zip(*chunks, *extremes, strict=True):
        _round(part, rounded)
        patterns = room[: len(part)]
        torch.bitwise_and(bits, form.magnitude, out=patterns)
        rows = patterns.view(-1, _ROW)
        torch.amin(rows, 1, out=low)
        torch.amax(rows, 1, out=high)
        tiny += _ones(patterns.lt_(form.normal))

    source, image = source.view(-1, _ROW), image.view(-1, _ROW)
    zeros = flushed = overflow = non_finite = 0
    max_abs = 0.0
    if lows.amin().item() == 0:
        for rows in _where(lows == 0):
            picked, left = source[rows], int(torch.count_nonzero(image[rows]))
            zeros += picked.numel() - left
            flushed += int(torch.count_nonzero(picked)) - left
    peak = highs.amax().item()
    if peak >= form.infinity:
        bad = highs >= form.infinity
        for rows in _where(bad):
            picked = image[rows]
            found = _count_now(source[rows], picked, clamp)
            overflow, non_finite = overflow + found.overflow, non_finite + found.non_finite
            max_abs = max(max_abs, found.max_abs)
            if clamp and image.dtype != source.dtype:
                image[rows] = picked
        # Less than any pattern: rows that are looked at here are not looked at again.
        peak = highs.masked_fill_(bad, -1).amax().item()
    for rows in _where(highs == peak) if peak >= 0 else ():
        max_abs = max(max_abs, source[rows].abs_().amax().item())
    return CastCounts(source.numel(), overflow, flushed, tiny - zeros, non_finite, max_abs)


def _where(mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """The indices of what is true, as many at a time as there are rows in a chunk."""
    indices = mask.nonzero().view(-1)
    return iter(indices.split(CPU_CHUNK // _ROW) if len(indices) else ())


def tally_on_device(source: torch.Tensor, image: torch.Tensor, clamp: bool) -> torch.Tensor:
    """Round ``source`` into ``image`` and count, reading nothing from the device; arguments of :func:`tally_on_cpu`.

    Returns:
        int64 of shape [7], for :func:`counts_from`.
    """
    numbers = torch.zeros(7, dtype=torch.int64, device=source.device)
    for flat in _flat(source, image, DEVICE_CHUNK):
        for part, rounded in zip(*(tensor.split(DEVICE_CHUNK) for tensor in flat), strict=True):
            _round(part, rounded)
            found = _count(part, rounded, clamp)
            numbers[:-1] += found[:-1]
            numbers[-1:] = torch.maximum(numbers[-1:], found[-1:])
    return numbers


def counts_from(numbers: Sequence[int], source: torch.dtype) -> CastCounts:
    """Counts from what was read of :func:`tally_on_device`'s numbers, for a tensor of the dtype ``source``."""
    values, bad_images, tiny_images, zero_images, bad, zeros, largest = numbers
    bits = torch.tensor(largest, dtype=_FORMATS[source].bits, device="cpu")
    return CastCounts(
        values=values,
        overflow=bad_images - bad,
        flushed=zero_images - zeros,
        subnormal=tiny_images - zero_images,
        non_finite=bad,
        max_abs=bits.view(source).item(),
    )


def _count_now(source: torch.Tensor, image: torch.Tensor, clamp: bool) -> CastCounts:
    return counts_from(_count(source, image, clamp).tolist(), source.dtype)


def _count(source: torch.Tensor, image: torch.Tensor, clamp: bool) -> torch.Tensor:
    """Count a chunk of any values, and clamp what overflowed if that is wanted.

    Returns:
        int64 of shape [7]: elements; images that are not finite, with zero's exponent, zero; of the source: not finite,
        zero, the pattern of the largest finite magnitude.
    """
    of_image, of_source = _FORMATS[image.dtype], _FORMATS[source.dtype]
    patterns = image.view(of_image.bits) & of_image.magnitude
    counts = [(patterns >= of_image.infinity).sum(), (patterns < of_image.normal).sum(), (patterns == 0).sum()]
    infinite = patterns == of_image.infinity
    patterns = source.view(of_source.bits) & of_source.magnitude
    bad = patterns >= of_source.infinity
    if clamp and image.dtype != source.dtype:
        # Next below infinity's pattern is that of the largest finite number, whatever the sign.
        image.view(of_image.bits).sub_(infinite.logical_and_(~bad).to(of_image.bits))
    counts += [bad.sum(), (patterns == 0).sum(), patterns.masked_fill_(bad, 0).amax().to(torch.int64)]
    return torch.stack([torch.full_like(counts[0], source.numel()), *counts])


def _ones(flags: torch.Tensor) -> int:
    """The sum of a flat tensor of zeros and ones; those of 16 bits are summed as lanes of 64-bit words."""
    rest = len(flags) % (_LANES * 4) if flags.element_size() == 2 else len(flags)
    count = 0
    if rest:
        flags, remainder = flags.split((len(flags) - rest, rest))
        count = int(remainder.sum(dtype=torch.int32))
    if len(flags):
        count += int(flags.view(torch.int64).view(-1, _LANES).sum(1).view(torch.int16).sum())
    return count


def _round(source: torch.Tensor, image: torch.Tensor) -> None:
    """``image`` becomes ``source`` rounded to nearest even."""
    if image.dtype == source.dtype:
        return
    if source.dtype == torch.float64 and image.dtype != torch.float32:
        # torch rounds by way of float32, and twice rounded is not always rounded.
        source = _rounded_to_odd(source)
    image.copy_(source)


def _rounded_to_odd(source: torch.Tensor) -> torch.Tensor:
    """float64 to float32, inexact values to the neighbour with the odd mantissa: rounding that again rounds once."""
    near = source.float()
    back = near.double()
    away = back.abs() > source.abs()
    # One pattern less is a step towards zero, also from infinity.
    bits = near.view(torch.int32) - away.to(torch.int32)
    inexact = (back != source) & ~source.isnan()
    return (bits | inexact.to(torch.int32)).view(torch.float32)


def _order(tensor: torch.Tensor) -> list[int]:
    """The dimensions from the widest stride on: so permuted, a transposed matrix is contiguous."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _flat(source: torch.Tensor, image: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both as flat tensors: in one pair, or, where ``source`` has gaps, in parts copied from it of at most ``size``."""
    if source.numel() == 0:
        return
    same = image is source
    if not source.is_contiguous():
        order = _order(source)
        source, image = source.permute(order), image.permute(order)
    if source.is_contiguous():
        yield source.view(-1), image.view(-1)
        return
    for part, rounded in _split(source, image, size):
        flat = part.reshape(-1)
        yield flat, flat if same else rounded.view(-1)


def _split(source: torch.Tensor, image: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if source.numel() <= size:
        yield source, image
        return
    step = size * len(source) // source.numel()
    if step == 0:  # one slice alone is larger
        for part, rounded in zip(source, image, strict=True):
            yield from _split(part, rounded, size)
        return
    for start in range(0, len(source), step):
        yield source[start : start + step], image[start : start + step]
