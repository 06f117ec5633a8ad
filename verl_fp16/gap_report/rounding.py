"""A copy of a model whose weights were rounded to another dtype and back: what a sync through that dtype leaves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from verl_fp16.gap_report.errors import GapError


def round_weights(model: Path, dtype: str, target: Path) -> Path:
    """Write ``model`` to ``target``, each floating weight rounded to ``dtype`` and kept in float32; once.

    Returns:
        ``target``.

    Raises:
        GapError: the model has no safetensors, or the disk is full.
    """
    if target.is_dir():
        return target
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise GapError(f"{model} has no safetensors: save it again with save_pretrained")
    fresh = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for file in model.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy(file, fresh / file.name)
        for file in files:
            _round_file(file, fresh / file.name, dtype)
        os.replace(fresh, target)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise GapError(f"{target}: it cannot be written ({error.strerror or error})") from None
    return target


def _round_file(file: Path, target: Path, dtype: str) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, framework="pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}
    rounded = {
        name: tensor.to(getattr(torch, dtype)).float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    save_file(rounded, target, metadata={"format": "pt"})
