"""Casting weights to a smaller dtype with a look at what that does to them; pure torch.

torch's cast makes infinity of what is too large and zero of what is too small, without a word. :class:`CheckedCast`
gives the same image and counts beside it, :mod:`verl_fp16.cast_tally` does the counting. On a CPU the counting takes
about as long as the cast, and a millisecond for small tensors: 2 to 4 times as long as ``tensor.to(torch.float16)``
alone for 1 to 10 million values. Beyond that memory matters more. Images that are let go one after another share theirs
(:mod:`verl_fp16.recycled_memory`), which with glibc's allocator makes this twice as fast as ``to`` for images of more
than 32 MiB, whose pages are new each time; where images are kept, it takes 1.3 to 1.6 times as long from ten million
values on (``benchmarks/weight_cast.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from verl_fp16.cast_tally import (
    DTYPES,
    CastCounts,
    CastMemory,
    counts_from,
    empty_image,
    tally_on_cpu,
    tally_on_device,
)

__all__ = [
    "OVERFLOW_POLICIES",
    "CastCounts",
    "CastMemory",
    "CheckedCast",
    "WeightOverflow",
    "non_finite_message",
    "overflow_message",
]

OVERFLOW_POLICIES = ("error", "clamp", "ignore")
"""What becomes of finite values beyond the range: ``error`` and ``ignore`` leave them infinite (and
:meth:`CheckedCast.check` raises, or does not), ``clamp`` brings them to the largest finite number. Inf and nan stay
what they are under each of them: they are a fault and no large weight."""

_NAMED = 5


class WeightOverflow(ValueError):
    """Weights do not fit the dtype that they are cast to; the message names them, and the way out."""


@dataclass(frozen=True)
class _Pending:
    """Counts that are still on their device: the numbers of :func:`tally_on_device`."""

    name: str
    source: torch.dtype
    numbers: torch.Tensor


class CheckedCast:
    """Casts tensors one by one and counts, for each name, what the cast did.

    Args:
        dtype: what is cast to: float16, bfloat16 or float32.
        on_overflow: one of :data:`OVERFLOW_POLICIES`.
        memory: of ``dtype``, for several of these casts after each other; its own where left out.

    Raises:
        ValueError: another dtype or policy.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float16, on_overflow: str = "error", memory: CastMemory | None = None
    ) -> None:
        if dtype not in DTYPES or dtype == torch.float64:
            raise ValueError(f"dtype must be torch.float16, torch.bfloat16 or torch.float32, got {dtype}")
        if on_overflow not in OVERFLOW_POLICIES:
            raise ValueError(f"on_overflow must be one of {', '.join(OVERFLOW_POLICIES)}, got {on_overflow!r}")
        self.dtype = dtype
        self.on_overflow = on_overflow
        self._memory = memory or CastMemory(dtype)
        self._counted: list[tuple[str, CastCounts] | _Pending] = []

    @torch.no_grad()
    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The image of ``tensor``, rounded to nearest even: same shape and device. Nothing is read from a device.

        Args:
            name: what the tensor is called in counts and messages; a name that comes again adds to its counts.
            tensor: floating, of any shape and strides. One that has the dtype already is counted and returned as it
                is, one of integers or bools is returned and not counted.

        Raises:
            ValueError: ``tensor`` is complex, or of a floating dtype below 16 bits.
        """
        if not tensor.is_floating_point() and not tensor.is_complex():
            return tensor
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which cannot be cast: only {', '.join(map(str, DTYPES))} can")
        source = tensor.detach()
        image = source if source.dtype == self.dtype else empty_image(source, self.dtype, self._memory.images)
        clamp = self.on_overflow == "clamp"
        if tensor.device.type == "cpu":
            self._counted.append((name, tally_on_cpu(source, image, clamp, self._memory.scratch)))
        else:
            self._counted.append(_Pending(name, source.dtype, tally_on_device(source, image, clamp)))
        return tensor if image is source else image

    def counts(self) -> dict[str, CastCounts]:
        """What was counted for each name, in the order in which the names came. Reads each device once for all."""
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
            WeightOverflow: under ``error`` values overflowed; under ``error`` and ``clamp`` values were not finite
                before the cast.
        """
        if self.on_overflow == "ignore":
            return
        counts = self.counts() if counts is None else counts
        messages = [overflow_message(counts, self.dtype) if self.on_overflow == "error" else ""]
        messages.append(non_finite_message(counts))
        if any(messages):
            raise WeightOverflow("\n".join(filter(None, messages)))

    def _read(self) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for index, item in enumerate(self._counted):
            if isinstance(item, _Pending):
                by_device.setdefault(item.numbers.device, []).append(index)
        for indices in by_device.values():
            pending = [self._counted[index] for index in indices]
            rows = torch.stack([item.numbers for item in pending]).tolist()
            for index, item, row in zip(indices, pending, rows, strict=True):
                self._counted[index] = (item.name, counts_from(row, item.source))


def overflow_message(counts: Mapping[str, CastCounts], dtype: torch.dtype) -> str:
    """What to tell of values beyond the range of ``dtype``: how many, in which tensors, the way out; "" without any."""
    found = {name: c for name, c in counts.items() if c.overflow}
    order = sorted(found, key=lambda name: found[name].max_abs, reverse=True)
    told = [
        f"{name} ({found[name].overflow:,} of {found[name].values:,}, largest magnitude {found[name].max_abs:.6g})"
        for name in order
    ]
    fault = f"beyond the range of {str(dtype).removeprefix('torch.')} ({torch.finfo(dtype).max:.6g})"
    ways = (
        "train and roll out in bfloat16, or, if these few may be cut to the largest number, cut them in the checkpoint "
        "('clamp' cuts what is cast here; a forward pass in the same dtype makes inf of the weights themselves)"
    )
    return _message(sum(c.overflow for c in found.values()), fault, told, ways)


def non_finite_message(counts: Mapping[str, CastCounts]) -> str:
    """What to tell of values that were inf or nan before the cast; "" without any."""
    found = {name: c for name, c in counts.items() if c.non_finite}
    order = sorted(found, key=lambda name: found[name].non_finite, reverse=True)
    told = [f"{name} ({found[name].non_finite:,} of {found[name].values:,})" for name in order]
    ways = "the weights themselves are, not their images: go back to a checkpoint that is finite"
    return _message(sum(c.non_finite for c in found.values()), "inf or nan", told, ways)


def _message(number: int, fault: str, tensors: list[str], way_out: str) -> str:
    if not tensors:
        return ""
    named = "; ".join(tensors[:_NAMED])
    more = f"; and {len(tensors) - _NAMED} more" if len(tensors) > _NAMED else ""
    weights = "weight is" if number == 1 else "weights are"
    where = "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"
    return f"{number:,} {weights} {fault}, in {where}: {named}{more}. Fix: {way_out}"
