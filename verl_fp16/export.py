"""Hugging Face exports of a trained role in the dtype that was declared for it; pure torch.

verl exports in BF16, whatever was trained: in the tag of an export with ``hf_model`` in the save contents, and in tag
and tensors of what its model merger makes of a checkpoint. What is declared travels with the checkpoint instead, in
:data:`MARK`, because a checkpoint's ``config.json`` says what the base model was tagged with when nobody declared
anything: a base in FP16 that was trained in BF16 would be taken for an FP16 run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from verl_fp16.weight_cast import OVERFLOW_POLICIES, CheckedCast, WeightOverflow
from verl_fp16.whole_files import write_whole

MARK = "verl_fp16_export.json"
"""The file beside a checkpoint's shards that says in which dtype the model is to be exported."""

VERLS_OWN = "bfloat16"
"""What verl exports in by itself: nothing has to be changed for it."""

_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_TAGS = ("dtype", "torch_dtype")  # transformers' name since 4.56, and before; newer ones read both
_FLOAT_TAGS = (*_DTYPES, VERLS_OWN)
_OF_SOMETHING_ELSE = ("quantization_config", "compression_config")


class ExportError(ValueError):
    """A role cannot be exported in the dtype that was declared; the message says why, and the way out."""


@dataclass(frozen=True)
class Export:
    """How a role is exported, where that is not verl's own way.

    Args:
        dtype: float16 or float32.
        on_overflow: what becomes of weights beyond the dtype's range, see :mod:`verl_fp16.weight_cast`.

    Raises:
        ExportError: another dtype or policy.
    """

    dtype: str
    on_overflow: str = "error"

    def __post_init__(self) -> None:
        for name, known in (("dtype", tuple(_DTYPES)), ("on_overflow", OVERFLOW_POLICIES)):
            if getattr(self, name) not in known:
                raise ExportError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @classmethod
    def of_role(cls, settings: Mapping[str, Any]) -> Export | None:
        """What a role's ``mixed_precision.verl_fp16`` declares; None where that is verl's own way.

        The actor is exported as the rollout was told to hold it, the critic as it computes.
        """
        declared = settings.get("weight_sync") or {"dtype": settings["dtype"], "on_overflow": "error"}
        return cls(declared["dtype"], declared["on_overflow"]) if declared["dtype"] != VERLS_OWN else None

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    def cast(self, state_dict: MutableMapping[str, Any]) -> str:
        """Put the images of all tensors into their places, one by one: at no time is there a second model.

        Returns:
            what is to be told of weights beyond the range that were not refused; "" without any.

        Raises:
            WeightOverflow: as :meth:`CheckedCast.check`.
        """
        cast = CheckedCast(self.torch_dtype, self.on_overflow)
        images: dict[Any, torch.Tensor] = {}
        for name, tensor in state_dict.items():
            if isinstance(tensor, torch.Tensor):
                # Tied weights stay tied: verl and transformers tell them by their storage.
                place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                if place not in images:
                    images[place] = cast(name, tensor)
                state_dict[name] = images[place]
        cast.check()
        return self._passed(cast)

    def _passed(self, cast: CheckedCast) -> str:
        beyond = {name: counts for name, counts in cast.counts().items() if counts.overflow}
        if not beyond:
            return ""
        became = "the largest finite number" if self.on_overflow == "clamp" else "inf"
        return (
            f"{sum(counts.overflow for counts in beyond.values()):,} weights beyond the range of {self.dtype} became "
            f"{became} (on_overflow={self.on_overflow}): {', '.join(beyond)}"
        )


def write_mark(folder: str | os.PathLike[str], export: Export) -> None:
    """Say beside a checkpoint's shards how the model is to be exported."""
    _write_json(Path(folder) / MARK, asdict(export), indent=None)


def read_mark(folder: str | os.PathLike[str]) -> Export | None:
    """How the model of a checkpoint is to be exported; None where nobody said, as in checkpoints of plain verl.

    Raises:
        ExportError: the file is there and cannot be read.
    """
    path = Path(folder) / MARK
    try:
        return Export(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(
            f'{path} cannot be read: {error}. Write it anew, as {{"dtype": "float16", "on_overflow": "error"}}, or '
            f"remove it, and verl exports in {VERLS_OWN}"
        ) from None


def read_tag(model_folder: str | os.PathLike[str]) -> str | None:
    """The dtype that a Hugging Face folder's ``config.json`` names; None where it names none."""
    config = json.loads(_config_file(model_folder).read_text(encoding="utf-8"))
    return next((config[key] for key in _TAGS if config.get(key) is not None), None)


def write_tag(model_folder: str | os.PathLike[str], dtype: str) -> None:
    """Have a Hugging Face folder's ``config.json`` name ``dtype``, for the model and for each part that names one."""
    path = _config_file(model_folder)
    config = json.loads(path.read_text(encoding="utf-8"))
    present = [key for key in _TAGS if key in config]
    config.update(dict.fromkeys(present or _TAGS[1:], dtype))  # the older name is read by every release
    for name, part in config.items():
        if isinstance(part, dict) and name.endswith("_config") and name not in _OF_SOMETHING_ELSE:
            part.update({key: dtype for key in _TAGS if part.get(key) in _FLOAT_TAGS})
    _write_json(path, config, indent=2)  # as transformers writes it


def _config_file(model_folder: str | os.PathLike[str]) -> Path:
    return Path(model_folder) / "config.json"


def _write_json(path: Path, value: Any, indent: int | None) -> None:
    write_whole(path, (json.dumps(value, indent=indent) + "\n").encode())


class KeepPrecision(TorchFunctionMode):
    """Context in which ``tensor.bfloat16()`` is ``tensor``, on this thread."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


class InDtype:
    """One of transformers' ``AutoModel`` classes, making models in ``dtype`` whatever it is asked for."""

    def __init__(self, auto_class: Any, dtype: torch.dtype) -> None:
        self._auto_class = auto_class
        self._dtype = dtype

    def from_config(self, *args: Any, **kwargs: Any) -> Any:
        return self._auto_class.from_config(*args, **{**kwargs, "torch_dtype": self._dtype})

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return self._auto_class.from_pretrained(*args, **{**kwargs, "torch_dtype": self._dtype})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._auto_class, name)


__all__ = [
    "MARK",
    "VERLS_OWN",
    "Export",
    "ExportError",
    "InDtype",
    "KeepPrecision",
    "WeightOverflow",
    "read_mark",
    "read_tag",
    "write_mark",
    "write_tag",
]
