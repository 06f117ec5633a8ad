"""The command preflight on small models: reading, verdicts, exit codes, memory."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from preflight_models import INDEX, TENSORS, found_in, make_model, preflight, with_weight
from safetensors.torch import save_file

from verl_fp16.cli import preflight_weights as command
from verl_fp16.guard.model import refused_in_float16
from verl_fp16.preflight import tensor_files, weights
from verl_fp16.preflight.shards import open_model, read

PAGE = Path(__file__).parents[2] / "docs" / "preflight.md"
COUNTED = ["overflow", "inf, nan", "to zero", "subnormal"]
COLUMNS = ["tensor", "shape", "stored", "max |w|", *COUNTED, "FP16 error", "BF16 error"]


@pytest.mark.parametrize(
    ("tensors", "config", "code", "told"),
    (
        (TENSORS, {}, 0, "FIT for FP16"),
        (with_weight(5000.0), {}, 1, "AT RISK: 1 tensor has weights above 4,094"),
        (with_weight(torch.full((10,), 1e-9)), {}, 1, "AT RISK: 1 tensor loses more than 1% of its weights to zero"),
        (with_weight(torch.full((10,), 3.5e-7)), {}, 1, "AT RISK: 1 tensor is rounded worse by FP16 than by BF16"),
        (with_weight(65519.9), {}, 1, "AT RISK"),
        (with_weight(65520.0), {}, 2, "UNFIT: 1 weight is beyond the range of float16 (65504), in 1 tensor: model.lm"),
        (with_weight(math.nan), {}, 2, "UNFIT: 1 weight is inf or nan, in 1 tensor: model.lm_head.weight (1 of 2)"),
        (TENSORS, {"model_type": "gemma3_text"}, 2, "UNFIT: the architecture gemma3_text is one that vLLM refuses"),
    ),
)
def test_verdicts_and_exit_codes(tensors, config, code, told, tmp_path):
    result = preflight(make_model(tmp_path / "model", tensors, **config))
    assert (result.exit_code, result.exception is None or isinstance(result.exception, SystemExit)) == (code, True)
    assert told in result.stdout
    assert "model.lm_head.weight" in result.stdout or tensors is TENSORS


def test_vllms_own_list_is_what_counts(tmp_path):
    for kind in sorted(refused_in_float16()):
        assert preflight(make_model(tmp_path / kind, model_type=kind)).exit_code == 2
    assert {"gemma2", "gemma3", "gemma3_text", "glm4"} <= refused_in_float16()


def test_what_is_printed_where_stdout_is_no_terminal(tmp_path):
    result = preflight(make_model(tmp_path / "model"))
    header, *lines = (line.split("\t") for line in result.stdout.splitlines() if "\t" in line)
    assert header == COLUMNS
    assert result.stdout.startswith("tensor\tshape\t")
    rows = {name: cells for name, *cells in lines}
    assert set(rows) == {name for name, tensor in TENSORS.items() if tensor.is_floating_point()}
    assert rows["model.conv.weight"][:2] == ["8x4x3x3", "bf16"]
    assert rows["model.conv.weight"][-1] == "stored"
    assert rows["model.norm.weight"] == ["64", "fp16", "1", "0", "0", "0", "0", "stored", "0"]
    assert rows["model.scale"][0] == "scalar"
    assert "5 tensors, 4,897 weights, " in result.stdout
    assert "skipped, being no weights: model.position_ids (I64)" in result.stdout
    assert "verl-fp16: reading " in result.stderr


def test_each_column_that_a_terminal_does_not_get_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(command, "is_terminal", lambda stream: stream is sys.stdout)
    told = preflight(make_model(tmp_path / "model")).stdout
    shown = told.splitlines()[0].split("\t")
    (left_out,) = re.findall("^left out, being zero or for want of room: (.*); --json has everything$", told, re.M)
    assert {"tensor", "max |w|"} <= set(shown) < set(COLUMNS)
    assert left_out == " | ".join(name for name in COLUMNS if name not in shown)
    assert "inf, nan" in left_out


def test_the_worst_are_shown_and_all_on_demand(tmp_path):
    tensors = {f"layer.{index}.weight": torch.full((4,), 1.0 + index) for index in range(30)}
    path = make_model(tmp_path / "model", tensors)
    worst, every = preflight(path).stdout, preflight(path, "--all").stdout
    names = re.findall(r"^(layer\.\d+)", worst, re.M)
    assert names == [f"layer.{index}" for index in range(29, 9, -1)]
    assert "shown are the 20 worst, --all shows every one" in worst
    assert len(re.findall(r"^layer", every, re.M)) == 30
    assert "shown are" not in every


@pytest.mark.parametrize(
    ("terminal", "width", "names"),
    (
        (True, 200, ["tensor", "shape", "max |w|", "to zero"]),
        (True, 40, ["tensor", "max |w|", "to zero"]),
        (True, 20, ["tensor", "max |w|"]),
        (False, 20, ["tensor", "shape", "max |w|", "overflow", "to zero"]),
    ),
)
def test_a_terminal_gets_no_column_of_zeros_and_none_that_it_has_no_room_for(terminal, width, names, monkeypatch):
    rows = [
        {"tensor": "a.weight", "shape": "1000x1000", "max |w|": "1", "overflow": "0", "to zero": "0.1"},
        {"tensor": "b.weight", "shape": "1000x1000", "max |w|": "1", "overflow": "0", "to zero": "0"},
    ]
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setattr(command.sys, "stdout", SimpleNamespace(isatty=lambda: terminal))
        columns, cells = command.fitting(rows, command._DISPENSABLE)
    assert columns == names
    assert cells == [[row[name] for name in names] for row in rows]


def test_json_has_everything_and_comes_back(tmp_path):
    path = make_model(tmp_path / "model", with_weight(7e4))
    result = preflight(path, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 2
    assert found["verdict"] == "UNFIT"
    assert found["reasons"][0]["verdict"] == "UNFIT" and "model.lm_head.weight" in found["reasons"][0]["why"]
    assert (found["model"], found["model_type"]) == (str(path), "qwen3")
    assert found["skipped"] == [{"name": "model.position_ids", "shape": [16], "dtype": "I64"}]
    rows = {row["name"]: row for row in found["tensors"]}
    assert set(rows) == {name for name, tensor in with_weight(7e4).items() if tensor.is_floating_point()}
    assert rows["model.conv.weight"]["dtype"] == "bfloat16"
    assert rows["model.conv.weight"]["bf16_error"] == 0.0
    assert rows["model.lm_head.weight"]["counts"]["overflow"] == 1
    for field in ("values", "overflow", "flushed", "subnormal", "non_finite"):
        assert found["total"][field] == sum(row["counts"][field] for row in rows.values())
    assert found["total"]["max_abs"] == pytest.approx(7e4)


def test_the_documentation_names_each_column_and_key(tmp_path):
    section = PAGE.read_text().partition("\n## The weights")[2].partition("\n## ")[0]
    found = found_in(make_model(tmp_path / "model", with_weight(7e4)))
    row = found["tensors"][0]
    keys = {*found, *found["reasons"][0], *row, *row["counts"], *found["skipped"][0], "error"}
    assert [key for key in sorted(keys) if f"`{key}`" not in section] == []
    columns = section.partition("| column | key |")[2].replace("\\|", "|")
    assert [name for name in COLUMNS if name not in columns] == []


def test_sharded_and_whole_and_a_single_file_give_the_same(tmp_path):
    tensors = with_weight(7e4)
    whole = found_in(make_model(tmp_path / "whole", tensors))
    sharded = found_in(
        make_model(tmp_path / "sharded", tensors, lambda name: f"model-{len(name) % 3}-of-3.safetensors")
    )
    file = found_in(tmp_path / "whole" / "model.safetensors")

    def comparable(found):
        return {**found, "model": "", "tensors": sorted(found["tensors"], key=lambda row: row["name"])}

    assert comparable(whole) == comparable(sharded) == comparable(file)


def test_a_tensor_in_two_shards_counts_where_the_index_says(tmp_path):
    path = make_model(tmp_path / "model", {"a.weight": torch.ones(3), "b.weight": torch.ones(3)}, lambda name: name[0])
    save_file({"b.weight": torch.full((3,), 7e4), "c.weight": torch.ones(5)}, path / "a")
    (path / INDEX).write_text(json.dumps({"weight_map": {"b.weight": "b", "c.weight": "a"}}))
    found = found_in(path)
    assert found["total"]["overflow"] == 0
    assert sorted(row["name"] for row in found["tensors"]) == ["b.weight", "c.weight"]
    # What the index does not know is loaded with its shard.
    (path / INDEX).write_text(json.dumps({"weight_map": {"c.weight": "a"}}))
    assert found_in(path)["total"]["overflow"] == 3


def test_shards_without_an_index_are_all_read(tmp_path):
    path = make_model(tmp_path / "model", {"a.weight": torch.ones(3)})
    (path / "model.safetensors").rename(path / "part-1.safetensors")
    save_file({"b.weight": torch.ones(3)}, path / "part-2.safetensors")
    assert [row["name"] for row in found_in(path)["tensors"]] == ["a.weight", "b.weight"]


def test_a_file_without_a_folder_of_a_model(tmp_path):
    save_file({"a.weight": torch.ones(3)}, tmp_path / "adapter.safetensors")
    result = preflight(tmp_path / "adapter.safetensors", "--json")
    assert (result.exit_code, json.loads(result.stdout)["model_type"]) == (0, None)


def test_masks_and_position_ids_are_skipped(tmp_path):
    mask = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    path = make_model(tmp_path / "model", {**TENSORS, "h.0.attn.bias": mask, "h.flag": torch.tensor([True])})
    assert {row["name"] for row in found_in(path)["skipped"]} == {"h.0.attn.bias", "h.flag", "model.position_ids"}


def test_ctrl_c_is_one_line(tmp_path, monkeypatch):
    def examine(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "examine", examine)
    threads = torch.get_num_threads()
    result = preflight(make_model(tmp_path / "model"))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[1:] == ["verl-fp16: interrupted; there is no verdict"]
    assert result.stdout == ""
    assert torch.get_num_threads() == threads


def test_pieces_are_the_tensor_and_no_larger_than_asked_for(tmp_path):
    model = open_model(make_model(tmp_path / "model"))
    read_names = []
    for tensor, pieces in read(model, piece=50):
        pieces = list(pieces)
        assert max(piece.numel() for piece in pieces) <= 50
        together = torch.cat([piece.reshape(-1) for piece in pieces])
        assert torch.equal(together, TENSORS[tensor.name].reshape(-1))
        read_names.append(tensor.name)
    assert set(read_names) == {name for name, tensor in TENSORS.items() if tensor.is_floating_point()}


def test_memory_does_not_grow_with_a_tensor(tmp_path, monkeypatch):
    """The largest read, and the same verdict as from one read."""
    path = make_model(tmp_path / "model", {"wide.weight": torch.randn(3, 9000), "tall.weight": torch.randn(9000, 3)})
    whole = found_in(path)
    reads = []
    original = tensor_files.pieces

    def recorded(tensor, most):
        for part in original(tensor, 1000):
            reads.append(part.numel())
            yield part

    monkeypatch.setattr("verl_fp16.preflight.shards.pieces", recorded)
    in_pieces = found_in(path)
    assert max(reads) <= 1000 < 27_000
    assert sum(reads) == 54_000
    for one, other in zip(whole["tensors"], in_pieces["tensors"], strict=True):
        assert one["counts"] == other["counts"]
        assert one["fp16_error"] == pytest.approx(other["fp16_error"], rel=1e-9)
