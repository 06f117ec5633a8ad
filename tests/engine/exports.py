"""Checkpoints of the FSDP engine for the tests of exports: written once a release, with the flag and without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from releases import RELEASES
from safetensors.torch import load_file, save_file

STOCK = {"VERL_FP16_DISABLE": "1"}
SEQUENCES = [list(range(start, start + 8)) for start in range(4)]
SHARDS = ("model", "optimizer", "extra")
WITH_EXPORT = (*SHARDS, "hf_model")

# In the weights of the base model: beyond FP16's range, and its neighbours that are not.
PLANTED = {
    "lm_head.weight": {(3, 5): 7e4, (4, 5): -1e38, (5, 5): 65519.0},
    "model.layers.1.mlp.down_proj.weight": {(0, 0): 65520.0},
}


def variant(model: Path, folder: Path, config: dict, planted: dict | None = None) -> Path:
    """A copy of ``model`` with other values in its configuration, and in its weights."""
    folder.mkdir()
    for path in model.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps({**json.loads((model / "config.json").read_text()), **config}))
    weights = load_file(model / "model.safetensors")
    for name, values in (planted or {}).items():
        for place, value in values.items():
            weights[name][place] = value
    if config.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_models(tiny_model: Path, folder: Path) -> dict[str, str]:
    made = {
        "plain": tiny_model,
        "float16 base": variant(tiny_model, folder / "float16", {"dtype": "float16"}),
        "large weights": variant(tiny_model, folder / "large", {}, PLANTED),
        "tied": variant(tiny_model, folder / "tied", {"tie_word_embeddings": True}),
    }
    return {name: str(path) for name, path in made.items()}


def saved(
    model: str,
    folder: str,
    strategy: str,
    dtype: str | None = "float16",
    *,
    sync: dict | None = None,
    contents: tuple = WITH_EXPORT,
    train: bool = True,
    **engine,
) -> dict:
    """Train a mini-batch and save; ``dtype`` None is verl without the flag."""
    import torch.distributed as dist

    from verl_fp16 import standalone

    precision = standalone.mixed_precision(dtype or "float16", loss_scale={"init": 1024.0})
    if dtype is None:
        del precision["verl_fp16"]
    elif sync is not None:
        precision["verl_fp16"]["weight_sync"] = sync
    if strategy == "fsdp" and dist.get_world_size() > 1:
        _keep_offloading_out()
    torch.manual_seed(0)
    checkpoint = {"save_contents": list(contents)}
    built = standalone.build_engine(model, precision=precision, strategy=strategy, checkpoint=checkpoint, **engine)
    if train:
        standalone.train_step(built, standalone.make_batch(SEQUENCES))
    try:
        built.save_checkpoint(folder)
    except ValueError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def _keep_offloading_out() -> None:
    """torch's FSDP1 frees what it has gathered when that is offloaded from the CPU to the CPU."""
    from torch.distributed import fsdp

    real = fsdp.FullStateDictConfig
    if isinstance(real, type):
        fsdp.FullStateDictConfig = lambda offload_to_cpu, rank0_only: real(False, rank0_only)


def loaded(model: str, folder: str, flag: bool) -> dict:
    """What verl's own loading makes of a checkpoint: this rank's state dict."""
    from verl_fp16 import standalone

    precision = standalone.mixed_precision("float16")
    if not flag:
        del precision["verl_fp16"]
    built = standalone.build_engine(model, precision=precision)
    built.load_checkpoint(folder, del_local_after_load=False)
    return {name: tensor.to_local() for name, tensor in built.module.state_dict().items()}


def applied_undone_and_applied(model: str, folder: str) -> list[str]:
    """Saves in one process with the hooks, without them, and with them again; and merges the first of them."""
    from types import SimpleNamespace

    from verl.model_merger.fsdp_model_merger import FSDPModelMerger

    from verl_fp16 import standalone
    from verl_fp16.hooks import patcher

    checkpoint = {"save_contents": list(WITH_EXPORT)}
    built = standalone.build_engine(model, precision=standalone.mixed_precision("float16"), checkpoint=checkpoint)
    fields = {"operation": "merge", "hf_upload": False, "trust_remote_code": False}
    for name, change in (("applied", None), ("undone", patcher.undo), ("applied again", patcher.apply)):
        if change is not None:
            change()
        built.save_checkpoint(f"{folder}/{name}")
        first = f"{folder}/applied"
        merged = f"{folder}/{name}/merged"
        config = SimpleNamespace(
            **fields, local_dir=first, target_dir=merged, hf_model_config_path=f"{first}/huggingface"
        )
        FSDPModelMerger(config).merge_and_save()
    return list(patcher.status().values())


def run_calls(calls: dict[str, tuple]) -> dict:
    """Call functions of this module one after the other on this rank: name -> (function's name, args, kwargs)."""
    return {name: globals()[function](*args, **kwargs) for name, (function, args, kwargs) in calls.items()}


class Saves:
    """Checkpoints that engines of several processes wrote: ``folder / <process> / <name>``."""

    def __init__(self, folder: Path, release: str, models: dict[str, str]):
        self.folder, self.release, self.models = folder, release, models
        self.results: dict[str, list[dict]] = {}

    def run(self, process: str, ranks: int, calls: dict[str, tuple], env: dict[str, str]) -> None:
        calls = {
            name: (function, (model, str(self.folder / process / name), *args), kwargs)
            for name, (function, model, args, kwargs) in calls.items()
        }
        scratch = self.folder / f"{process}-files"
        for path in (scratch, self.folder / process):
            path.mkdir()
        self.results[process] = on_ranks(ranks, run_calls, calls, folder=scratch, release=self.release, env=env)

    def path(self, process: str, name: str) -> Path:
        return self.folder / process / name

    def errors(self, process: str, name: str) -> list[str | None]:
        return [of_rank[name]["error"] for of_rank in self.results[process]]


def make_saves(release: str, models: dict[str, str], folder: Path) -> Saves:
    """Every checkpoint that a test looks at: on one rank, on two, and of stock verl in the CPU room."""
    plain, large, tied = models["plain"], models["large weights"], models["tied"]
    lora = {"lora_rank": 4, "contents": SHARDS}
    fp16_sync = {"dtype": "float16", "on_overflow": "error"}

    def save(model: str, *args, **kwargs) -> tuple:
        return "saved", model, args, kwargs

    def overflow(policy: str, strategy: str = "fsdp2") -> tuple:
        sync = {"dtype": "float16", "on_overflow": policy, "audit_interval": 50}
        return save(large, strategy, sync=sync, train=False)

    one_rank = {
        "fsdp": save(plain, "fsdp"),
        "fsdp2": save(plain, "fsdp2"),
        "tied": save(tied, "fsdp2", train=False),
        "no hf_model": save(plain, "fsdp2", contents=SHARDS),
        "fsdp lora": save(plain, "fsdp", **lora),
        "fsdp2 lora": save(plain, "fsdp2", **lora),
        "critic": save(plain, "fsdp2", train=False, model_type="value_model"),
        "bfloat16, rolled out in float16": save(plain, "fsdp2", "bfloat16", sync=fp16_sync),
        "rolled out in float32": save(plain, "fsdp2", "bfloat16", sync={**fp16_sync, "dtype": "float32"}),
        "bfloat16": save(plain, "fsdp2", "bfloat16"),
        "error": overflow("error"),
        "clamp": overflow("clamp"),
        "ignore": overflow("ignore"),
        "clamp without hf_model": save(
            large, "fsdp2", sync={**fp16_sync, "on_overflow": "clamp"}, train=False, contents=SHARDS
        ),
        "no flag": save(models["float16 base"], "fsdp2", None),
        "no flag, no hf_model": save(models["float16 base"], "fsdp", None, contents=SHARDS),
    }
    stock = {
        name: save(models["float16 base"], *one_rank[name][2], **one_rank[name][3])
        for name in ("no flag", "no flag, no hf_model")
    }
    stock["tied"] = save(tied, "fsdp2", None, train=False)
    stock["bfloat16"] = one_rank["bfloat16"]
    two_ranks = {
        "fsdp": save(plain, "fsdp"),
        "fsdp2": save(plain, "fsdp2"),
        "fsdp2 lora": save(plain, "fsdp2", **lora),
        "fsdp lora": save(plain, "fsdp", **lora),
        "fsdp2 error": overflow("error"),
        "fsdp error": overflow("error", "fsdp"),
    }
    if release == RELEASES[-1]:
        one_rank["undone"] = ("applied_undone_and_applied", plain, (), {})
    made = Saves(folder, release, models)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(made.run, "one rank", 1, one_rank, {}),
            pool.submit(made.run, "stock", 1, stock, STOCK),
            pool.submit(made.run, "two ranks", 2, two_ranks, {}),
        ]
        for job in jobs:
            job.result()
    return made


def masters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The FP32 weights in a checkpoint's shards, put together without verl."""
    ranks = json.loads((checkpoint / "fsdp_config.json").read_text())["world_size"]
    files = [checkpoint / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    shards = [torch.load(file, weights_only=False) for file in files]
    whole = {}
    for name, first in shards[0].items():
        if hasattr(first, "placements"):
            locals_ = [shard[name]._local_tensor for shard in shards]
            whole[name] = torch.cat(locals_, dim=first.placements[0].dim)
        else:
            whole[name] = first
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    return whole


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def in_dtype(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: weight.to(dtype) for name, weight in weights.items()}


def files_of(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())


def assert_same_files(first: Path, second: Path) -> None:
    assert list(files_of(first)) == list(files_of(second))
    for name in files_of(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


CASES = (("one rank", "fsdp"), ("one rank", "fsdp2"), ("two ranks", "fsdp"), ("two ranks", "fsdp2"))


def skip_but_for_the_newest(saves: Saves) -> None:
    """For what is alike in all releases once it is hooked: a few tests run everywhere."""
    if saves.release != RELEASES[-1]:
        pytest.skip("once is enough")
