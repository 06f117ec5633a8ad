"""The largest power of two that a loss can be multiplied by without a gradient beyond float16. Pure Python.

Gradients are linear in the scale, so one backward pass in which nothing overflows predicts it; two more verify it: at
the scale found all gradients are finite, and at twice the scale they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

LARGEST = 65504.0
LOWEST, HIGHEST = -24, 30
"""Exponents that are tried. Below 2^-24 the number one times the scale is zero in float16."""

_STEP = 4  # exponents down from a scale that overflows, until one does not


class Seen(Protocol):
    """What a backward pass tells, with the scale in it."""

    @property
    def largest(self) -> float: ...

    @property
    def non_finite(self) -> int: ...


@dataclass(frozen=True)
class LossScale:
    """What was found.

    Args:
        exponent: of the largest power of two that does not overflow; None where even the smallest overflows, or where
            no gradient is other than zero.
        verified: a backward pass at it was finite, and one at twice the scale was not. False for what was only
            predicted, being larger than the largest that matters, and at the largest that is tried.
        largest_at_one: the largest magnitude of a gradient, without scale; None without a finite pass.
        tried: exponents of the backward passes made, in order.
    """

    exponent: int | None
    verified: bool
    largest_at_one: float | None
    tried: tuple[int, ...]

    @property
    def scale(self) -> float | None:
        return None if self.exponent is None else 2.0**self.exponent


def search(backward: Callable[[float], Seen], start: int = 16, matters_below: int | None = None) -> LossScale:
    """Find it.

    Args:
        backward: makes a backward pass at a scale.
        start: exponent of the first.
        matters_below: an exponent that is known to be the most; a larger prediction is not verified.
    """
    seen: dict[int, Seen] = {}

    def at(exponent: int) -> Seen:
        if exponent not in seen:
            seen[exponent] = backward(2.0**exponent)
        return seen[exponent]

    base = start
    while at(base).non_finite:
        if base == LOWEST:
            return LossScale(None, False, None, tuple(seen))
        base = max(LOWEST, base - _STEP)
    if not at(base).largest:
        return LossScale(None, False, 0.0, tuple(seen))
    largest = at(base).largest / 2.0**base
    found = min(HIGHEST, max(LOWEST, math.floor(math.log2(LARGEST / largest))))
    if matters_below is not None and found > matters_below:
        return LossScale(found, False, largest, tuple(seen))
    while found > base and at(found).non_finite:
        found -= 1
    while found < HIGHEST and not at(found + 1).non_finite:
        found += 1
    return LossScale(found, found < HIGHEST, largest, tuple(seen))
