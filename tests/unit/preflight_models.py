"""Small models in safetensors for the tests of preflight, and the command on them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from verl_fp16.cli.app import app

TENSORS = {
    "model.embed_tokens.weight": torch.randn(70, 64, generator=torch.Generator().manual_seed(1)) * 0.02,
    "model.conv.weight": torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "model.norm.weight": torch.ones(64, dtype=torch.float16),
    "model.norm.bias": torch.zeros(64),
    "model.scale": torch.tensor(0.5, dtype=torch.float64),
    "model.position_ids": torch.arange(16),
}
INDEX = "model.safetensors.index.json"


def make_model(path: Path, tensors: dict[str, torch.Tensor] | None = None, shard_of=None, **config) -> Path:
    """A model folder; ``shard_of`` says which shard a name is in, and adds the index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
    tensors = TENSORS if tensors is None else tensors
    places = {name: shard_of(name) if shard_of else "model.safetensors" for name in tensors}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == file}, path / file)
    if shard_of:
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def preflight(path: Path, *options: str):
    """The command on the weights: these models cannot be run."""
    return CliRunner().invoke(app, ["preflight", str(path), "--weights-only", *options])


def found_in(path: Path) -> dict:
    result = preflight(path, "--json")
    return json.loads(result.stdout)


def with_weight(value: float | torch.Tensor) -> dict[str, torch.Tensor]:
    weight = value if isinstance(value, torch.Tensor) else torch.tensor([value, 0.5])
    return {**TENSORS, "model.lm_head.weight": weight}
