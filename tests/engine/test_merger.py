"""verl's model merger on the engine's checkpoints, run as a user runs it: a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exports import (
    CASES,
    PLANTED,
    STOCK,
    Saves,
    assert_same,
    assert_same_files,
    in_dtype,
    masters,
    skip_but_for_the_newest,
    variant,
)
from releases import release_environment
from safetensors.torch import load_file

from verl_fp16.export import MARK, read_tag, write_tag


def merger(saves: Saves, operation: str, checkpoint: Path, *arguments: str, env: dict | None = None):
    command = [sys.executable, "-m", "verl.model_merger", operation, "--backend", "fsdp", "--local_dir", checkpoint]
    environment = {**os.environ, **release_environment(saves.release), "VERL_PLATFORM": "cpu", **(env or {})}
    return subprocess.run(
        [*map(str, command), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=200
    )


def copied(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder / "checkpoint"))


def merge(saves: Saves, checkpoint: Path, target: Path, env: dict | None = None) -> Path:
    done = merger(saves, "merge", checkpoint, "--target_dir", target, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("is merged in float16, as verl_fp16_export.json says" in done.stderr) is (
        (checkpoint / MARK).exists() and env is None
    )
    return target


@pytest.mark.parametrize(("process", "strategy"), CASES)
def test_the_merger_keeps_float16(saves, tmp_path, process, strategy):
    if (process, strategy) != CASES[-1]:
        skip_but_for_the_newest(saves)
    checkpoint = saves.path(process, strategy)
    merged = merge(saves, checkpoint, tmp_path / "merged")
    assert_same(load_file(merged / "model.safetensors"), in_dtype(masters(checkpoint), torch.half))
    # The same model, whichever way it was exported.
    exported = checkpoint / "huggingface"
    assert (merged / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (merged, exported)]
    assert configs[0] == {key: value for key, value in configs[1].items() if key != "attn_implementation"}
    assert (merged / "generation_config.json").read_bytes() == (exported / "generation_config.json").read_bytes()


def test_stock_merger_rounds_the_same_checkpoint_to_bfloat16(saves, tmp_path):
    skip_but_for_the_newest(saves)
    checkpoint = saves.path("two ranks", "fsdp2")
    merged = merge(saves, checkpoint, tmp_path / "merged", env=STOCK)
    assert_same(load_file(merged / "model.safetensors"), in_dtype(masters(checkpoint), torch.bfloat16))
    assert read_tag(merged) == "bfloat16"


@pytest.mark.parametrize(("process", "strategy"), CASES)
def test_the_merger_keeps_adapter_and_base_in_float16(saves, tmp_path, process, strategy):
    if (process, strategy) != CASES[-1]:
        skip_but_for_the_newest(saves)
    checkpoint = saves.path(process, f"{strategy} lora")
    merged = merge(saves, checkpoint, tmp_path / "merged")
    weights = in_dtype(masters(checkpoint), torch.half)
    adapter = {key.replace(".default.", "."): w for key, w in weights.items() if "lora_" in key}
    assert adapter
    base = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for key, weight in weights.items()
        if "lora_" not in key
    }
    assert_same(load_file(merged / "lora_adapter" / "adapter_model.safetensors"), adapter)
    assert_same(load_file(merged / "model.safetensors"), base)
    assert read_tag(merged) == "float16"


@pytest.mark.parametrize("name", ("no flag", "no flag, no hf_model"))
def test_a_checkpoint_of_plain_verl_is_merged_as_ever(saves, tmp_path, name):
    """Whatever its tag is: one of FP16 does not make it an FP16 run."""
    if name != "no flag":
        skip_but_for_the_newest(saves)
    checkpoint = copied(saves.path("stock", name), tmp_path)
    assert read_tag(checkpoint / "huggingface") == ("bfloat16" if name == "no flag" else "float32")
    write_tag(checkpoint / "huggingface", "float16")
    ours, stock = (merge(saves, checkpoint, tmp_path / str(env), env=env) for env in (None, STOCK))
    assert_same_files(ours, stock)
    assert read_tag(ours) == "bfloat16"


def test_the_operation_test_compares_in_float16(saves, tmp_path):
    skip_but_for_the_newest(saves)
    checkpoint = saves.path("two ranks", "fsdp2")
    exported = checkpoint / "huggingface"
    done = merger(saves, "test", checkpoint, "--test_hf_dir", exported)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FSDP checks passed" in done.stdout
    changed = variant(exported, tmp_path / "changed", {}, {"lm_head.weight": {(0, 0): 1.0}})
    done = merger(saves, "test", checkpoint, "--test_hf_dir", changed)
    assert done.returncode != 0
    assert "Tensor-likes are not close" in done.stderr


def test_the_merger_refuses_weights_beyond_the_range_before_it_writes(saves, tmp_path):
    checkpoint = saves.path("two ranks", "fsdp2 error")
    done = merger(saves, "merge", checkpoint, "--target_dir", tmp_path / "merged")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert f"WeightOverflow: {checkpoint}: nothing was merged: 3 weights are beyond the range of float16" in last
    assert all(part in last for part in (*PLANTED, f"on_overflow is in {checkpoint / MARK}"))
    assert list((tmp_path / "merged").iterdir()) == []


def test_the_merger_clamps_where_the_mark_says_so(saves, tmp_path):
    skip_but_for_the_newest(saves)
    checkpoint = saves.path("one rank", "clamp without hf_model")
    merged = load_file(merge(saves, checkpoint, tmp_path / "merged") / "model.safetensors")
    assert merged["lm_head.weight"][3:6, 5].tolist() == [65504.0, -65504.0, 65504.0]
    assert merged["model.layers.1.mlp.down_proj.weight"][0, 0] == 65504.0


def test_a_tag_that_was_changed_since_is_followed(saves, tmp_path):
    skip_but_for_the_newest(saves)
    checkpoint = copied(saves.path("one rank", "rolled out in float32"), tmp_path)
    write_tag(checkpoint / "huggingface", "bfloat16")
    done = merger(saves, "merge", checkpoint, "--target_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count(f"{MARK} says float32, huggingface/config.json bfloat16: verl goes on in bfloat16") == 1
    assert_same(load_file(tmp_path / "merged" / "model.safetensors"), in_dtype(masters(checkpoint), torch.bfloat16))


def test_a_broken_mark_stops_the_merger(saves, tmp_path):
    skip_but_for_the_newest(saves)
    checkpoint = copied(saves.path("one rank", "ignore"), tmp_path)
    (checkpoint / MARK).write_text("{")
    done = merger(saves, "merge", checkpoint, "--target_dir", tmp_path / "merged")
    assert done.returncode != 0
    assert f"ExportError: {checkpoint / MARK} cannot be read" in done.stderr
