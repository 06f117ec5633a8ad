"""Finding a model's safetensors and reading them in pieces of a bounded size."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from verl_fp16.preflight.place import located
from verl_fp16.preflight.refusals import CONFIG, INDEX, SINGLE, ModelError, inaccessible, no_safetensors, unreadable
from verl_fp16.preflight.tensor_files import WEIGHT_DTYPES, pieces, values_start

PIECE = 2**19
"""Elements that are read at once: with larger pieces, new memory for the temporaries costs more than the arithmetic."""

_INTEGERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
_SHARD = re.compile(r"(?P<model>.*)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
_MASKS = ("bias", "masked_bias", "mask")  # GPT-2 keeps its causal mask as bytes, under the first of these names


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a shard's header has it.

    Args:
        dtype: in the words of safetensors, such as BF16.
        start: where in the file its values begin, in bytes.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def values(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.values * _BYTES.get(self.dtype, 8)


@dataclass(frozen=True)
class Model:
    """A model's weights, and what of its files is none.

    Args:
        weights: the floating tensors, file by file, in their order in the file.
        skipped: tensors of integers or bools, such as position ids.
        model_type: the architecture, as ``config.json`` says it; None without that file.
        notes: what a verdict on it leaves open, and where it was found, in sentences.
    """

    path: Path
    weights: tuple[StoredTensor, ...]
    skipped: tuple[StoredTensor, ...]
    model_type: str | None
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all weights in their files."""
        return sum(tensor.size for tensor in self.weights)


def open_model(path: Path) -> Model:
    """Read the headers of a model's shards.

    Args:
        path: a model folder, or one file of safetensors, beside which a ``config.json`` may lie; or the name of a model
            in the Hugging Face cache.

    Raises:
        ModelError: it is no model, is incomplete or damaged, or is quantized.
    """
    path, cached = located(path)
    folder = path if path.is_dir() else path.parent
    config = _config(folder / CONFIG)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else quantization
        raise ModelError(
            f"{folder / CONFIG}: the model is quantized ({method}), and FP16 does not act on quantized weights. "
            "Name the model that it was quantized from"
        )
    tensors = _headers(path)
    for tensor in tensors:
        _refuse_unfit_dtype(tensor)
    weights = tuple(tensor for tensor in tensors if tensor.dtype in WEIGHT_DTYPES)
    if not sum(tensor.values for tensor in weights):
        raise ModelError(f"{path}: there is no weight in it. Name a model that has been trained, or save it again")
    skipped = tuple(tensor for tensor in tensors if tensor.dtype not in WEIGHT_DTYPES)
    model_type = config.get("model_type")
    model_type = model_type if isinstance(model_type, str) else None
    notes = (f"read from the Hugging Face cache: {path}",) if cached else ()
    notes += tuple(_notes(path, folder, model_type, {tensor.file.name for tensor in weights}))
    return Model(path, weights, skipped, model_type, notes)


def _notes(path: Path, folder: Path, model_type: str | None, files: set[str]) -> Iterator[str]:
    shard = _SHARD.fullmatch(path.name)
    if shard and path.is_file() and int(shard["total"]) > 1:
        yield f"1 of {int(shard['total'])} shards looked at: name the folder for the whole model"
    without_config = not (folder / CONFIG).is_file()
    if without_config:
        yield f"no {CONFIG}: architecture and quantization were not checked"
    elif model_type is None:
        yield f"no model_type in {CONFIG}: the architecture was not checked"
    if "adapter_model.safetensors" in files or (without_config and (folder / "adapter_config.json").is_file()):
        yield "this is a LoRA adapter: check its base model too"


def read(model: Model, piece: int = PIECE) -> Iterator[tuple[StoredTensor, Iterator[torch.Tensor]]]:
    """Each weight with its values, flat, in pieces of at most ``piece`` elements; these are to be used up one by one.

    Raises:
        ModelError: a file has become unreadable since :func:`open_model`.
    """
    for tensor in model.weights:
        yield tensor, pieces(tensor, piece)


def _headers(path: Path) -> list[StoredTensor]:
    """The tensors of all shards; each is in one of them."""
    if path.is_file():
        return _header(path)
    if (path / INDEX).is_file():
        return _indexed(path / INDEX)
    files = [path / SINGLE] if (path / SINGLE).is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise no_safetensors(path)
    _refuse_incomplete(path, files)
    found: dict[str, StoredTensor] = {}
    for tensor in (tensor for file in files for tensor in _header(file)):
        other = found.setdefault(tensor.name, tensor)
        if other is not tensor:
            raise ModelError(
                f"{path}: {tensor.name} is both in {other.file.name} and in {tensor.file.name}, and no {INDEX} says "
                "which counts. Name one of the files, or remove what is not the model's"
            )
    return list(found.values())


def _refuse_incomplete(folder: Path, files: list[Path]) -> None:
    """Without an index the names of shards are what says how many there are."""
    numbers: dict[tuple[str, str], dict[int, str]] = {}
    for shard in filter(None, (_SHARD.fullmatch(file.name) for file in files)):
        numbers.setdefault((shard["model"], shard["total"]), {})[int(shard["number"])] = shard["number"]
    for (model, total), there in numbers.items():
        if (missing := int(total) - len(there)) > 0:
            first = next(number for number in range(0 if 0 in there else 1, int(total) + 1) if number not in there)
            name = f"{model}-{first:0{len(next(iter(there.values())))}}-of-{total}.safetensors"
            more = f" (and {missing - 1} more of {int(total)})" if missing > 1 else ""
            raise ModelError(
                f"{folder}: {name} is missing{more}: the model is incomplete. Download or save the model again"
            )


def _indexed(index: Path) -> list[StoredTensor]:
    places = _json(index).get("weight_map")
    again = "Download the model again"
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ModelError(f"{index}: there is no weight_map in it, which says where each tensor is. {again}")
    files = {name: index.parent / name for name in sorted(set(places.values()))}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        more = f" (and {len(missing) - 1} more of {len(files)})" if len(missing) > 1 else ""
        raise ModelError(f"{index}: it names {missing[0]}{more}, which is not there. {again}: the shard is missing")
    found = {name: _header(file) for name, file in files.items()}
    held = {name: {tensor.name for tensor in tensors} for name, tensors in found.items()}
    for tensor, name in places.items():
        if tensor not in held[name]:
            raise ModelError(
                f"{index}: it says that {tensor} is in {name}, where it is not. {again}: index and shards do not "
                "belong together"
            )
    # A tensor that the index does not know is read as well: so do vLLM and transformers.
    return [t for name, tensors in found.items() for t in tensors if places.get(t.name, name) == name]


def _header(file: Path) -> list[StoredTensor]:
    with _opened(file) as shard:
        names = shard.offset_keys() if hasattr(shard, "offset_keys") else shard.keys()
        stored = [(name, shard.get_slice(name)) for name in names]
    starts = values_start(file)
    return [
        StoredTensor(name, file, piece.get_dtype(), tuple(piece.get_shape()), starts[name]) for name, piece in stored
    ]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from None


def _refuse_unfit_dtype(tensor: StoredTensor) -> None:
    if tensor.dtype in WEIGHT_DTYPES:
        return
    if tensor.dtype.startswith("C"):
        raise ModelError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}: float16 has no complex numbers. "
            "Name a model whose weights are real numbers"
        )
    last = tensor.name.rpartition(".")[2]
    packed = "weight" in last or (tensor.dtype in ("U8", "I8") and len(tensor.shape) > 1 and last not in _MASKS)
    if tensor.dtype not in _INTEGERS or packed:
        raise ModelError(
            f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}: the model is quantized, and FP16 does not act "
            "on quantized weights. Name the model that it was quantized from"
        )


def _config(file: Path) -> dict[str, Any]:
    return _json(file) if file.is_file() or file.is_symlink() else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise inaccessible(file, error) from None
    except ValueError as error:
        raise ModelError(f"{file}: it is not readable as JSON ({error}). Repair it or download it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: it is JSON but no object. Repair it or download it again")
    return content
