"""What FP16 does to the values of a tensor, beside what BF16 does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from verl_fp16.weight_cast import CastCounts, CheckedCast


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute in this thread alone: on cores that others use too, its threads wait for each other at every
    operation, which made an examination twelve times as long; and on free ones the file is what takes the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class TensorReport:
    """A tensor and what FP16 would make of it.

    Args:
        shape, dtype: as it is stored; the dtype in torch's words, such as bfloat16.
        counts: of the cast to float16.
        fp16_error, bf16_error: the root mean square of the rounding error over that of the values, both over the values
            whose image is finite. What is stored in a dtype has no error in it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    counts: CastCounts
    fp16_error: float
    bf16_error: float


def examine(name: str, shape: tuple[int, ...], dtype: str, pieces: Iterable[torch.Tensor]) -> TensorReport:
    """Examine a tensor that comes in ``pieces`` of the dtype ``dtype``, which are looked at one by one."""
    cast = CheckedCast(torch.float16, on_overflow="ignore")
    values = fp16 = bf16 = 0.0
    for piece in pieces:
        exact = piece if piece.dtype == torch.float64 else piece.float()
        image = cast(name, exact)
        found = _errors(exact, image, dtype)
        if not math.isfinite(sum(found)):
            # What is inf or nan has no rounding error, and what becomes so none that could be told beside others.
            finite = image.isfinite()
            found = _errors(exact[finite], image[finite], dtype)
        values, fp16, bf16 = values + found[0], fp16 + found[1], bf16 + found[2]
    fp16_error, bf16_error = (math.sqrt(error / values) if values else 0.0 for error in (fp16, bf16))
    return TensorReport(name, shape, dtype, cast.total(), fp16_error, bf16_error)


def _errors(exact: torch.Tensor, image: torch.Tensor, dtype: str) -> tuple[float, float, float]:
    """Sums of squares: of the values, of FP16's rounding error, of BF16's."""
    fp16 = 0.0 if dtype == "float16" else _squares(image - exact)
    bf16 = 0.0 if dtype == "bfloat16" else _squares(exact.bfloat16() - exact)
    return _squares(exact), fp16, bf16


def _squares(tensor: torch.Tensor) -> float:
    """The sum of squares, in float64, since the squares of small weights vanish in float32."""
    # A third of the time of vector_norm with this dtype.
    exact = tensor.reshape(-1).double()
    return torch.dot(exact, exact).item()
