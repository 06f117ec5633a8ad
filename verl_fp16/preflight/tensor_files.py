"""The values of stored tensors, read in pieces.

Files are read, not mapped: what is mapped counts as this process's memory as long as the mapping lives, a whole shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from verl_fp16.preflight.refusals import inaccessible, unreadable

if TYPE_CHECKING:
    from verl_fp16.preflight.shards import StoredTensor

WEIGHT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_METADATA = "__metadata__"


def pieces(tensor: StoredTensor, most: int, first: int = 0, count: int | None = None) -> Iterator[torch.Tensor]:
    """The elements of ``tensor`` from ``first`` on, ``count`` of them or all, flat and as they are stored.

    Args:
        most: elements of a piece.

    Raises:
        ModelError: the file cannot be read any more, or ends too soon.
    """
    dtype = getattr(torch, WEIGHT_DTYPES[tensor.dtype])
    left = tensor.values - first if count is None else count
    try:
        with open(tensor.file, "rb", buffering=0) as file:
            file.seek(tensor.start + first * dtype.itemsize)
            while left:
                buffer = bytearray(min(left, most) * dtype.itemsize)
                _read_all(file, buffer)
                yield torch.frombuffer(buffer, dtype=dtype)
                left -= min(left, most)
    except EOFError as error:
        raise unreadable(tensor.file, error) from None
    except OSError as error:
        raise inaccessible(tensor.file, error) from None


def fill(out: torch.Tensor, tensor: StoredTensor, most: int, first: int = 0) -> None:
    """``out``, flat, becomes the elements of ``tensor`` from ``first`` on, rounded to its dtype once.

    float64 is rounded to float32 first, in which verl has its master weights.
    """
    at = 0
    for piece in pieces(tensor, most, first, out.numel()):
        out[at : at + piece.numel()].copy_(piece.float() if piece.dtype == torch.float64 else piece)
        at += piece.numel()


def values_start(file: Path) -> dict[str, int]:
    """Where in a file of safetensors the first byte of each tensor is.

    The format: eight bytes with the header's length, the header in JSON, the values.
    """
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != _METADATA}


def _read_all(file: BinaryIO, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError("it ends before its last tensor")
        view = view[count:]
