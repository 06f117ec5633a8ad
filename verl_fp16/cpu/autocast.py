"""Softmax, log-softmax and logsumexp in FP32 under CPU autocast, as under CUDA autocast.

CUDA autocast runs softmax, log-softmax and logsumexp in FP32 (torch's list of operations that autocast to float32);
CPU autocast leaves them in half precision, and with them log-probabilities, entropy and the loss, whose rounding then
hides the training-inference gap that is to be measured. Registering the three for the ``AutocastCPU`` dispatch key
gives CPU autocast the same results, in verl's code and in the model's, without touching either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_AUTOCAST_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_HALF = (torch.float16, torch.bfloat16)
_library: torch.library.Library | None = None


def _float32_by_dtype(operation):
    """A kernel for ``operation(input, dim, dtype)`` that computes half precision inputs in float32."""

    def kernel(input, dim, dtype=None):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_CPU):
            if dtype is None and input.dtype in _HALF:
                dtype = torch.float32
            return operation(input, dim, dtype=dtype)

    return kernel


def _logsumexp(input, dim, keepdim=False):
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_CPU):
        return torch.ops.aten.logsumexp.default(input.float() if input.dtype in _HALF else input, dim, keepdim)


def keep_softmax_in_float32() -> None:
    """Make softmax, log_softmax and logsumexp of half precision inputs return float32 under CPU autocast.

    Outside ``torch.autocast("cpu", ...)`` nothing changes. Idempotent.
    """
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("softmax.int", _float32_by_dtype(torch.ops.aten.softmax.int), "AutocastCPU")
    _library.impl("log_softmax.int", _float32_by_dtype(torch.ops.aten.log_softmax.int), "AutocastCPU")
    _library.impl("logsumexp", _logsumexp, "AutocastCPU")


def undo() -> None:
    """Give CPU autocast torch's own list back."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


@contextlib.contextmanager
def softmax_in_float32() -> Iterator[None]:
    """:func:`keep_softmax_in_float32` for a while; afterwards it is as it was before."""
    before = _library is not None
    keep_softmax_in_float32()
    try:
        yield
    finally:
        if not before:
            undo()
