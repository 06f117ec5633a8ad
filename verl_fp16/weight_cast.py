"""Casting weights to a smaller dtype, and counting what that does to them; pure torch.

The image is torch's own cast. Beside it a tensor is counted: what overflowed, what became zero or subnormal, what was
not finite before. Numbers are judged by their bits: of floats of one sign, the larger one has the larger pattern.

* On a CPU reading a number costs nothing, so a chunk is looked at as closely as its smallest and largest magnitude ask
  for: see :func:`_tally_on_cpu`.
* Elsewhere nothing is read before :meth:`CheckedCast.counts`: see :func:`_tally_on_device`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch

OVERFLOW_POLICIES = ("error", "clamp", "ignore")
"""What becomes of finite values beyond the dtype's range: ``error`` and ``ignore`` leave them infinite (and
:meth:`CheckedCast.check` raises, or does not), ``clamp`` brings them to the largest finite number."""

_CPU_CHUNK = 2**18  # elements for each thread: image and scratch stay in a core's second-level cache
_DEVICE_CHUNK = 2**24  # large enough to hide the start of a kernel, small beside the model
_MOST_THREADS = 16  # bounds the scratch memory
_ROW = 1024  # how closely zeros are looked for
_LANES = 2**14  # 64-bit words that are summed at once: a lane of 16 bits must not run over
_NAMED = 5


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


class WeightOverflow(ValueError):
    """Weights do not fit the dtype that they are cast to; the message names them, and the way out."""


@dataclass(frozen=True)
class _Format:
    """A float dtype's bit patterns without the sign, as integers of the same width."""

    bits: torch.dtype
    magnitude: int  # the mask that takes the sign away; the largest pattern
    infinity: int
    normal: int  # of the smallest normal number


def _format(bits: torch.dtype, width: int, mantissa: int) -> _Format:
    magnitude = 2 ** (width - 1) - 1
    return _Format(bits, magnitude, magnitude - (2**mantissa - 1), 2**mantissa)


_FORMATS = {
    torch.float16: _format(torch.int16, 16, 10),
    torch.bfloat16: _format(torch.int16, 16, 7),
    torch.float32: _format(torch.int32, 32, 23),
    torch.float64: _format(torch.int64, 64, 52),
}


@dataclass(frozen=True)
class _Pending:
    """Counts that are still on the device: :func:`_tally_on_device`'s vector."""

    name: str
    values: int
    source: torch.dtype
    numbers: torch.Tensor

    def read(self, numbers: list[int]) -> CastCounts:
        bad_images, tiny_images, zero_images, bad, zeros, largest = numbers
        bits = torch.tensor(largest, dtype=_FORMATS[self.source].bits)
        return CastCounts(
            values=self.values,
            overflow=bad_images - bad,
            flushed=zero_images - zeros,
            subnormal=tiny_images - zero_images,
            non_finite=bad,
            max_abs=bits.view(self.source).item(),
        )


class CheckedCast:
    """Casts tensors one by one and counts, for each name, what the cast did.

    Args:
        dtype: what is cast to: float16, bfloat16 or float32.
        on_overflow: one of :data:`OVERFLOW_POLICIES`.

    Raises:
        ValueError: another dtype or policy.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, on_overflow: str = "error") -> None:
        if dtype not in _FORMATS or dtype == torch.float64:
            raise ValueError(f"dtype must be torch.float16, torch.bfloat16 or torch.float32, got {dtype}")
        if on_overflow not in OVERFLOW_POLICIES:
            raise ValueError(f"on_overflow must be one of {', '.join(OVERFLOW_POLICIES)}, got {on_overflow!r}")
        self.dtype = dtype
        self.on_overflow = on_overflow
        self._clamp = on_overflow == "clamp"
        self._counted: list[tuple[str, CastCounts] | _Pending] = []

    @torch.no_grad()
    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The image of ``tensor``, rounded to nearest even: same shape and device, nothing read from the device.

        Args:
            name: what the tensor is called in counts and messages; a name may come again.
            tensor: floating, of any shape and strides. One that has the dtype already is counted and returned as it
                is; one of integers or bools is returned and not counted.

        Raises:
            ValueError: ``tensor`` is of a dtype that is not known here, such as one of 8 bits.
        """
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        if tensor.dtype not in _FORMATS:
            raise ValueError(f"{name} is {tensor.dtype}: only {', '.join(map(str, _FORMATS))} can be cast")
        source = tensor.detach()
        image = source if source.dtype == self.dtype else torch.empty_like(source, dtype=self.dtype)
        if tensor.device.type == "cpu":
            self._counted.append((name, _tally_on_cpu(source, image, self._clamp)))
        else:
            numbers = _tally_on_device(source, image, self._clamp)
            self._counted.append(_Pending(name, source.numel(), source.dtype, numbers))
        return tensor if image is source else image

    def counts(self) -> dict[str, CastCounts]:
        """For each name, in the order in which they came first, what was counted. Reads each device once."""
        self._read()
        merged: dict[str, CastCounts] = {}
        for name, counts in self._counted:
            merged[name] = merged.get(name, CastCounts()) + counts
        return merged

    def total(self) -> CastCounts:
        """The counts of all tensors together."""
        return sum(self.counts().values(), CastCounts())

    def check(self, counts: Mapping[str, CastCounts] | None = None) -> None:
        """Hold what was counted against the policy.

        Args:
            counts: by name, such as those of several ranks together; this cast's own where left out.

        Raises:
            WeightOverflow: under ``error`` values have overflowed; under ``error`` and ``clamp`` values were not finite
                before the cast.
        """
        if self.on_overflow == "ignore":
            return
        counts = self.counts() if counts is None else counts
        messages = [overflow_message(counts, self.dtype)] if self.on_overflow == "error" else []
        if text := "\n".join(filter(None, [*messages, _non_finite_message(counts)])):
            raise WeightOverflow(text)

    def _read(self) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for index, item in enumerate(self._counted):
            if isinstance(item, _Pending):
                by_device.setdefault(item.numbers.device, []).append(index)
        for indices in by_device.values():
            pending = [self._counted[index] for index in indices]
            rows = torch.stack([item.numbers for item in pending]).tolist()
            for index, item, row in zip(indices, pending, rows, strict=True):
                self._counted[index] = (item.name, item.read(row))


def _tally_on_cpu(source: torch.Tensor, image: torch.Tensor, clamp: bool) -> CastCounts:
    """Round ``source`` into ``image`` and count.

    Each chunk's smallest and largest pattern say what is to be looked for. Weights seldom have more to it than
    subnormal numbers, which are counted in every chunk; the exact largest magnitude is then that of the chunks whose
    image is the largest, since rounding keeps the order.
    """
    form = _FORMATS[image.dtype]
    total, largest, candidates = CastCounts(values=source.numel()), -1, []
    room = torch.empty(min(source.numel(), _cpu_chunk()), dtype=form.bits)
    mask = torch.tensor(form.magnitude, dtype=form.bits)
    for part, rounded in _chunks(source, image, _cpu_chunk()):
        _round(part, rounded)
        scratch = room[: part.numel()]
        torch.bitwise_and(rounded.view(form.bits), mask, out=scratch.view(part.shape))
        low, high = (extreme.item() for extreme in torch.aminmax(scratch))
        if high >= form.infinity:
            exact = _Pending("", 0, part.dtype, _count_chunk(part, rounded, clamp))
            total += exact.read(exact.numbers.tolist())
            continue
        if high >= largest:
            candidates = [*candidates, part] if high == largest else [part]
            largest = high
        if low < form.normal:
            zero_images, zeros = _zeros(part, rounded, scratch) if low == 0 else (0, 0)
            tiny = _ones(scratch.lt_(form.normal))
            total += CastCounts(flushed=zero_images - zeros, subnormal=tiny - zero_images)
    for part in candidates:
        total += CastCounts(max_abs=max(abs(extreme.item()) for extreme in torch.aminmax(part)))
    return total


def _zeros(source: torch.Tensor, image: torch.Tensor, patterns: torch.Tensor) -> tuple[int, int]:
    """How many zeros ``image`` has, and how many ``source``: they are looked for in rows that have one."""
    if source.dim() == 1 and len(source) % _ROW == 0:
        rows = (patterns.view(-1, _ROW).amin(1) == 0).nonzero().flatten()
        source, image = source.view(-1, _ROW)[rows], image.view(-1, _ROW)[rows]
    return tuple(tensor.numel() - int(torch.count_nonzero(tensor)) for tensor in (image, source))


def _ones(flags: torch.Tensor) -> int:
    """The sum of a contiguous tensor of zeros and ones, which are summed as lanes of 64-bit words where that can be."""
    whole = flags.numel() // (_LANES * 4) * (_LANES * 4) if flags.element_size() == 2 else 0
    count = int(flags[whole:].sum(dtype=torch.int32)) if whole < flags.numel() else 0
    for word in flags[:whole].view(torch.int64).view(-1, _LANES).sum(1).tolist():
        count += sum((word >> shift) & 0xFFFF for shift in (0, 16, 32, 48))
    return count


def _tally_on_device(source: torch.Tensor, image: torch.Tensor, clamp: bool) -> torch.Tensor:
    """Round ``source`` into ``image`` and count, with no look at what came out.

    Returns:
        int64 of shape [6] on the device: see :func:`_count_chunk`.
    """
    numbers = torch.zeros(6, dtype=torch.int64, device=source.device)
    for part, rounded in _chunks(source, image, _DEVICE_CHUNK):
        _round(part, rounded)
        found = _count_chunk(part, rounded, clamp)
        numbers[:5] += found[:5]
        numbers[5:] = torch.maximum(numbers[5:], found[5:])
    return numbers


def _count_chunk(source: torch.Tensor, image: torch.Tensor, clamp: bool) -> torch.Tensor:
    """Count a chunk of any values, and clamp what overflowed if that is wanted.

    Returns:
        int64 of shape [6]: images not finite, images with the exponent of zero, images that are zero; of the source:
        not finite, zero, the pattern of the largest finite magnitude.
    """
    of_image, of_source = _FORMATS[image.dtype], _FORMATS[source.dtype]
    patterns = image.view(of_image.bits) & of_image.magnitude
    numbers = [(patterns >= of_image.infinity).sum(), (patterns < of_image.normal).sum(), (patterns == 0).sum()]
    infinite = patterns == of_image.infinity if clamp and image.dtype != source.dtype else None
    patterns = source.view(of_source.bits) & of_source.magnitude
    bad = patterns >= of_source.infinity
    if infinite is not None:
        # The pattern below infinity's is the largest finite number's, whatever the sign.
        image.view(of_image.bits).sub_(infinite.logical_and_(~bad).to(of_image.bits))
    numbers += [bad.sum(), (patterns == 0).sum(), patterns.masked_fill_(bad, 0).amax().to(torch.int64)]
    return torch.stack(numbers)


def _round(source: torch.Tensor, image: torch.Tensor) -> None:
    """``image`` becomes ``source`` rounded to nearest even; nothing to do where they are the same tensor."""
    if image.dtype == source.dtype:
        return
    if source.dtype == torch.float64 and image.dtype != torch.float32:
        # torch rounds by way of float32, and twice rounded is not always rounded.
        source = _rounded_to_odd(source)
    image.copy_(source)


def _rounded_to_odd(source: torch.Tensor) -> torch.Tensor:
    """float64 to float32, inexact values to the neighbour with an odd mantissa: rounding that again rounds once."""
    near = source.float()
    back = near.double()
    away = back.abs() > source.abs()
    # A pattern less is a step towards zero, also from infinity.
    bits = near.view(torch.int32) - away.to(torch.int32)
    inexact = (back != source) & ~source.isnan()
    return (bits | inexact.to(torch.int32)).view(torch.float32)


def _chunks(source: torch.Tensor, image: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors in matching parts of at most ``size`` elements; flat ones where memory allows."""
    if source.numel() == 0:
        return
    # In the order of memory a transposed matrix is contiguous, too.
    order = sorted(range(source.dim()), key=source.stride, reverse=True)
    source, image = source.permute(order), image.permute(order)
    if source.is_contiguous() and image.is_contiguous():
        source, image = source.view(-1), image.view(-1)
    yield from _split(source, image, size)


def _split(source: torch.Tensor, image: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if source.numel() <= size:
        yield source, image
        return
    step = max(1, size * len(source) // source.numel())
    for start in range(0, len(source), step):
        yield from _split(source[start : start + step], image[start : start + step], size)


def _cpu_chunk() -> int:
    return _CPU_CHUNK * min(torch.get_num_threads(), _MOST_THREADS)


def overflow_message(counts: Mapping[str, CastCounts], dtype: torch.dtype) -> str:
    """What to tell of values beyond the range of ``dtype``: the worst tensors and the way out; "" without any."""
    worst = {name: c for name, c in counts.items() if c.overflow}
    if not worst:
        return ""
    ways = "train on in bfloat16, or cast with on_overflow='clamp' if so few large weights may be cut"
    return _message(
        worst, "overflow", f"are beyond the range of {_name(dtype)} (largest {torch.finfo(dtype).max:.6g})", ways
    )


def _non_finite_message(counts: Mapping[str, CastCounts]) -> str:
    worst = {name: c for name, c in counts.items() if c.non_finite}
    ways = "they were so before the cast: look for the step, or the checkpoint, in which they became so"
    return _message(worst, "non_finite", "are inf or nan", ways) if worst else ""


def _message(worst: Mapping[str, CastCounts], field: str, fault: str, way_out: str) -> str:
    order = sorted(
        worst, key=lambda name: (-worst[name].max_abs if field == "overflow" else 0, -getattr(worst[name], field))
    )
    told = [_told(name, worst[name], field) for name in order[:_NAMED]]
    more = [f"and {len(order) - _NAMED} more tensors"] if len(order) > _NAMED else []
    number = sum(getattr(c, field) for c in worst.values())
    return f"{number:,} weights of {len(worst)} tensors {fault}: {'; '.join(told + more)}. Fix: {way_out}"


def _told(name: str, counts: CastCounts, field: str) -> str:
    largest = f", largest magnitude {counts.max_abs:.6g}" if field == "overflow" else ""
    return f"{name} ({getattr(counts, field):,} of {counts.values:,}{largest})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
