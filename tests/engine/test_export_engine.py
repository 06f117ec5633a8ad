"""Checkpoints of verl's FSDP engine with what they export: with the flag, without it, and of stock verl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exports import (
    CASES,
    PLANTED,
    STOCK,
    assert_same,
    assert_same_files,
    files_of,
    in_dtype,
    loaded,
    masters,
    skip_but_for_the_newest,
)
from ranks import on_ranks
from safetensors.torch import load_file

from verl_fp16.export import MARK, read_tag


@pytest.mark.parametrize(("process", "name"), CASES)
def test_hf_model_is_the_float16_image_of_the_masters(saves, process, name):
    assert set(saves.errors(process, name)) == {None}
    checkpoint = saves.path(process, name)
    assert_same(load_file(checkpoint / "huggingface" / "model.safetensors"), in_dtype(masters(checkpoint), torch.half))
    assert read_tag(checkpoint / "huggingface") == "float16"
    assert json.loads((checkpoint / MARK).read_text()) == {"dtype": "float16", "on_overflow": "error"}


def test_stock_verl_writes_float32_under_a_bfloat16_tag(saves):
    """What the hooks are for. If this fails, verl has changed."""
    checkpoint = saves.path("stock", "no flag")
    assert_same(load_file(checkpoint / "huggingface" / "model.safetensors"), masters(checkpoint))
    assert read_tag(checkpoint / "huggingface") == "bfloat16"
    assert not (checkpoint / MARK).exists()


def test_transformers_loads_the_export_in_float16(saves):
    from transformers import AutoModelForCausalLM

    checkpoint = saves.path("one rank", "fsdp2")
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "huggingface")
    assert_same(model.state_dict(), in_dtype(masters(checkpoint), torch.half))


def test_tied_weights_are_exported_once_as_by_verl(saves):
    exported, stock = (
        load_file(saves.path(process, "tied") / "huggingface" / "model.safetensors")
        for process in ("one rank", "stock")
    )
    assert "lm_head.weight" not in exported
    assert_same(exported, in_dtype(stock, torch.half))


def test_without_hf_model_the_tag_is_the_declared_dtype(saves):
    checkpoint = saves.path("one rank", "no hf_model")
    assert read_tag(checkpoint / "huggingface") == "float16"
    assert (checkpoint / MARK).exists()
    assert not (checkpoint / "huggingface" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "dtype"),
    (
        ("critic", "float16"),
        ("bfloat16, rolled out in float16", "float16"),
        ("rolled out in float32", "float32"),
    ),
)
def test_the_dtype_of_the_weight_sync_is_exported(saves, name, dtype):
    checkpoint = saves.path("one rank", name)
    exported = load_file(checkpoint / "huggingface" / "model.safetensors")
    assert_same(exported, in_dtype(masters(checkpoint), getattr(torch, dtype)))
    assert read_tag(checkpoint / "huggingface") == dtype
    assert json.loads((checkpoint / MARK).read_text())["dtype"] == dtype


@pytest.mark.parametrize("name", ("no flag", "no flag, no hf_model", "bfloat16"))
def test_verls_own_checkpoint_is_what_it_was(saves, name):
    """Without the flag, and with the flag in BF16, which is what verl exports by itself."""
    ours, stock = saves.path("one rank", name), saves.path("stock", name)
    assert_same_files(ours / "huggingface", stock / "huggingface")
    assert MARK not in list(files_of(ours))
    of_flag = {"loss_scale_world_size_1_rank_0.json"}
    assert set(files_of(ours)) - of_flag == set(files_of(stock)) - of_flag
    assert_same(masters(ours), masters(stock))


def check_complete_but_for_the_export(checkpoint: Path, ranks: int) -> None:
    kinds = ("model", "optim", "extra_state")
    shards = {f"{kind}_world_size_{ranks}_rank_{rank}.pt" for kind in kinds for rank in range(ranks)}
    scales = {f"loss_scale_world_size_{ranks}_rank_{rank}.json" for rank in range(ranks)}
    assert shards | scales | {"fsdp_config.json", MARK, "huggingface/config.json"} <= set(files_of(checkpoint))
    assert not [name for name in files_of(checkpoint) if name.endswith(".safetensors")]
    assert masters(checkpoint)["lm_head.weight"][3, 5] == 7e4


@pytest.mark.parametrize(
    ("process", "name", "ranks"),
    (("one rank", "error", 1), ("two ranks", "fsdp2 error", 2), ("two ranks", "fsdp error", 2)),
)
def test_weights_beyond_the_range_fail_on_every_rank_after_the_checkpoint_is_complete(saves, process, name, ranks):
    errors = saves.errors(process, name)
    assert len(set(errors)) == 1 and len(errors) == ranks
    error, checkpoint = errors[0], saves.path(process, name)
    assert error.startswith(f"WeightOverflow: actor, {checkpoint}: nothing was written for hf_model: ")
    assert "3 weights are beyond the range of float16 (65504), in 2 tensors" in error
    assert all(part in error for part in (*PLANTED, "1e+38", "65520", "verl_fp16.sync.on_overflow"))
    check_complete_but_for_the_export(checkpoint, ranks)


@pytest.mark.parametrize(("policy", "largest"), (("clamp", 65504.0), ("ignore", torch.inf)))
def test_weights_beyond_the_range_follow_the_policy(saves, policy, largest):
    checkpoint = saves.path("one rank", policy)
    exported = load_file(checkpoint / "huggingface" / "model.safetensors")
    expected = in_dtype(masters(checkpoint), torch.half)
    expected["lm_head.weight"][3, 5], expected["lm_head.weight"][4, 5] = largest, -largest
    expected["model.layers.1.mlp.down_proj.weight"][0, 0] = largest
    assert_same(exported, expected)
    assert json.loads((checkpoint / MARK).read_text())["on_overflow"] == policy
    told = (saves.folder / "one rank-files" / "log-0.txt").read_text()
    assert f"verl_fp16: actor, {checkpoint}: 3 weights beyond the range of float16 became " in told


def test_verl_loads_the_checkpoint(saves, tmp_path):
    """With the flag and, in a process without the hooks, as it ever was."""
    checkpoint = saves.path("two ranks", "fsdp2")
    for flag, env in ((True, {}), (False, STOCK)):
        folder = tmp_path / str(flag)
        folder.mkdir()
        found = on_ranks(
            2, loaded, saves.models["plain"], str(checkpoint), flag, folder=folder, release=saves.release, env=env
        )
        together = {name: torch.cat([of_rank[name] for of_rank in found]) for name in found[0]}
        assert_same(together, masters(checkpoint))


def test_applied_undone_and_applied_again(saves):
    skip_but_for_the_newest(saves)
    folder = saves.path("one rank", "undone")
    tags = {name: read_tag(folder / name / "huggingface") for name in ("applied", "undone", "applied again")}
    assert tags == {"applied": "float16", "undone": "bfloat16", "applied again": "float16"}
    assert not (folder / "undone" / MARK).exists()
    merged = {name: load_file(folder / name / "merged" / "model.safetensors")["lm_head.weight"].dtype for name in tags}
    assert merged == {"applied": torch.half, "undone": torch.bfloat16, "applied again": torch.half}
