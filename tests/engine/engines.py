"""Small FP16 engines of verl for tests, made, trained on a fixed batch, and looked into in the processes of ranks."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch

STRATEGIES = ("fsdp", "fsdp2")
SEQUENCES = [list(range(start, start + 6 + start % 5)) for start in range(8)]
PARAMETER = "model.layers.1.mlp.gate_proj.weight"  # FSDP1, too, has a part of it on each of two ranks


def run_calls(module: str, calls: dict[str, tuple]) -> dict:
    """Name -> what the named function of a test module returns, for all of a process's share of the tests."""
    there = importlib.import_module(module)
    return {name: getattr(there, function)(*arguments) for name, (function, *arguments) in calls.items()}


def make_engine(model: str, strategy: str, *, faults=(), folder=None, scale=None, optimizer=None, **kwargs):
    from verl_fp16 import standalone

    torch.manual_seed(0)
    precision = standalone.mixed_precision("float16", loss_scale=scale, fault_injection=faults, folder=folder)
    return standalone.build_engine(model, precision=precision, strategy=strategy, optimizer=optimizer, **kwargs)


def mine() -> list:
    import torch.distributed as dist

    return SEQUENCES[dist.get_rank() :: dist.get_world_size()]


def train(engine, last_of_step: bool = True, **kwargs) -> dict:
    from verl_fp16 import standalone

    batch = standalone.make_batch(mine(), micro_batch_size=max(1, len(mine()) // 2), last_of_step=last_of_step)
    return standalone.train_step(engine, batch, **kwargs)


def state_of(engine) -> list[tuple[str, torch.Tensor]]:
    """This rank's master weights and optimizer state, step counters too."""
    found = []
    for group in engine.optimizer.param_groups:
        for number, parameter in enumerate(group["params"]):
            tensors = {"weight": parameter, **engine.optimizer.state.get(parameter, {})}
            for name, tensor in sorted(tensors.items()):
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                found.append((f"{number} {name}", local.detach().clone()))
    return found


def same(a: list, b: list) -> bool:
    return [n for n, _ in a] == [n for n, _ in b] and all(
        torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True)
    )


def skips_in(folder: str, role: str = "actor") -> list[dict]:
    file = Path(folder) / "verl_fp16" / f"skips-{role}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
