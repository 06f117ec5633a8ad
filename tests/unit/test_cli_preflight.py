"""The command preflight on small models: reading, verdicts, refusals, exit codes, memory."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from verl_fp16.cli import preflight as command
from verl_fp16.cli.app import app
from verl_fp16.guard.model import refused_in_float16
from verl_fp16.preflight import shards, weights
from verl_fp16.preflight.shards import ModelError, open_model, read, slices

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
    return CliRunner().invoke(app, ["preflight", str(path), *options])


def found_in(path: Path) -> dict:
    result = preflight(path, "--json")
    return json.loads(result.stdout)


def with_weight(value: float | torch.Tensor) -> dict[str, torch.Tensor]:
    weight = value if isinstance(value, torch.Tensor) else torch.tensor([value, 0.5])
    return {**TENSORS, "model.lm_head.weight": weight}


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
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in result.stdout.splitlines() if "\t" in line}
    assert set(rows) == {name for name, tensor in TENSORS.items() if tensor.is_floating_point()}
    assert rows["model.conv.weight"][:2] == ["8x4x3x3", "bf16"]
    assert rows["model.conv.weight"][-1] == "stored"
    assert rows["model.norm.weight"] == ["64", "fp16", "1", "0", "0", "0", "0", "stored", "0"]
    assert rows["model.scale"][0] == "scalar"
    assert "5 tensors, 4,897 weights, " in result.stdout
    assert "skipped, being no weights: model.position_ids (I64)" in result.stdout
    assert "verl-fp16: reading " in result.stderr


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
        columns, cells = command._columns(rows)
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


def missing(path: Path) -> Path:
    return path / "not-there"


def without_anything(path: Path) -> Path:
    path.mkdir()
    return path


def without_weights(path: Path) -> Path:
    make_model(path)
    (path / "model.safetensors").unlink()
    return path


def pickled(path: Path) -> Path:
    without_weights(path)
    (path / "pytorch_model.bin").write_bytes(b"")
    return path


def a_pickled_file(path: Path) -> Path:
    return pickled(path) / "pytorch_model.bin"


def of_a_dead_link(path: Path) -> Path:
    without_weights(path)
    (path / "model.safetensors").symlink_to(path / "blob")
    return path


def without_a_shard(path: Path) -> Path:
    make_model(path, shard_of=lambda name: f"model-{len(name) % 2}.safetensors")
    (path / "model-1.safetensors").unlink()
    return path


def truncated(path: Path) -> Path:
    file = make_model(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return path


def of_noise(path: Path) -> Path:
    (make_model(path) / "model.safetensors").write_bytes(b"\xff" * 500)
    return path


def pointer(path: Path) -> Path:
    (make_model(path) / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return path


def with_a_wrong_index(path: Path) -> Path:
    make_model(path, shard_of=lambda name: f"model-{len(name) % 2}.safetensors")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.gone.weight"] = "model-0.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    return path


def with_an_index_of_nothing(path: Path) -> Path:
    (make_model(path) / INDEX).write_text("{}")
    return path


def with_a_broken_index(path: Path) -> Path:
    (make_model(path) / INDEX).write_text('{"weight_map": {')
    return path


def with_a_broken_config(path: Path) -> Path:
    (make_model(path) / "config.json").write_text("{'model_type': ")
    return path


def with_a_list_for_a_config(path: Path) -> Path:
    (make_model(path) / "config.json").write_text("[]")
    return path


def quantized_by_config(path: Path) -> Path:
    return make_model(path, quantization_config={"quant_method": "gptq", "bits": 4})


def with_a_tensor(name: str, tensor: torch.Tensor):
    return lambda path: make_model(path, {**TENSORS, name: tensor})


def empty(path: Path) -> Path:
    save_file({}, make_model(path) / "model.safetensors")
    return path


def of_integers(path: Path) -> Path:
    return make_model(path, {"model.position_ids": torch.arange(4)})


def twice(path: Path) -> Path:
    make_model(path)
    (path / "model.safetensors").rename(path / "consolidated.safetensors")
    save_file({"model.scale": torch.ones(1)}, path / "part.safetensors")
    return path


REFUSED = {
    missing: ("not-there: there is no such file or folder", "Name a Hugging Face model folder"),
    without_anything: ("has no config.json and no safetensors", "Name a Hugging Face model folder"),
    without_weights: ("has a config.json and no weights", "Name a Hugging Face model folder"),
    pickled: ("pytorch_model.bin and no safetensors", "save_pretrained("),
    a_pickled_file: ("its weights are pytorch_model.bin and no safetensors", "save_pretrained("),
    of_a_dead_link: ("model.safetensors: safetensors cannot read it (No such file", "Download or save it again"),
    without_a_shard: (f"{INDEX}: it names model-1.safetensors, which is not there", "Download the model again"),
    truncated: ("model.safetensors: safetensors cannot read it (incomplete metadata", "Download or save it again"),
    of_noise: ("model.safetensors: safetensors cannot read it (", "Download or save it again"),
    pointer: ("model.safetensors: this is a pointer of Git LFS", "git lfs pull"),
    with_a_wrong_index: ("model.gone.weight is in model-0.safetensors, where it is not", "Download the model again"),
    with_an_index_of_nothing: (f"{INDEX}: there is no weight_map", "Download the model again"),
    with_a_broken_index: (f"{INDEX}: it is not readable as JSON (Expecting", "download it again"),
    with_a_broken_config: ("config.json: it is not readable as JSON (Expecting", "Repair it"),
    with_a_list_for_a_config: ("config.json: it is JSON but no object", "Repair it"),
    quantized_by_config: ("config.json: the model is quantized (gptq)", "that it was quantized from"),
    with_a_tensor("model.mlp.weight", torch.ones(4, 4, dtype=torch.int8)): (
        "model.mlp.weight is stored as I8: the model is quantized",
        "that it was quantized from",
    ),
    with_a_tensor("model.experts.gate_up_proj_blocks", torch.ones(4, 4, dtype=torch.uint8)): (
        "gate_up_proj_blocks is stored as U8",
        "that it was quantized from",
    ),
    with_a_tensor("model.q.qweight", torch.ones(4, 4, dtype=torch.int32)): (
        "model.q.qweight is stored as I32",
        "that it was quantized from",
    ),
    with_a_tensor("model.experts.gate_up_proj", torch.ones(4, 4).to(torch.float8_e4m3fn)): (
        "gate_up_proj is stored as F8_E4M3",
        "that it was quantized from",
    ),
    empty: ("there is no weight in it", "save it again"),
    of_integers: ("there is no weight in it", "save it again"),
    twice: ("model.scale is both in consolidated.safetensors and in part.safetensors", "Name one of the files"),
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("options", ((), ("--json",)))
def test_what_cannot_be_judged_is_one_message_and_no_verdict(make, options, tmp_path):
    result = preflight(make(tmp_path / "model"), *options)
    assert result.exit_code == 3
    assert result.stdout == ""
    (message,) = [line for line in result.stderr.splitlines() if "reading" not in line]
    assert message.startswith(f"verl-fp16: {tmp_path}")
    assert [text for text in REFUSED[make] if text not in message] == []


def test_the_name_of_a_hub_model_says_how_to_download_it():
    result = CliRunner().invoke(app, ["preflight", "Qwen/Qwen3-0.6B"])
    assert result.exit_code == 3
    assert "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B" in result.stderr


@pytest.mark.parametrize("arguments", ((), ("model", "--unknown"), ("a", "b")))
def test_a_wrong_call_is_no_verdict_either(arguments):
    result = CliRunner().invoke(app, ["preflight", *arguments])
    assert result.exit_code == 3
    assert "Usage" in result.stderr


def test_masks_and_position_ids_are_skipped(tmp_path):
    mask = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    path = make_model(tmp_path / "model", {**TENSORS, "h.0.attn.bias": mask, "h.flag": torch.tensor([True])})
    assert {row["name"] for row in found_in(path)["skipped"]} == {"h.0.attn.bias", "h.flag", "model.position_ids"}


def test_a_file_that_goes_away_while_it_is_read(tmp_path):
    path = make_model(tmp_path / "model")
    model = open_model(path)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="model.safetensors: safetensors cannot read it"):
        list(read(model))


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


def test_without_torch_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "verl_fp16.preflight.shards", None)
    result = preflight(make_model(tmp_path / "model"))
    assert result.exit_code == 3
    assert "torch and safetensors are needed" in result.stderr


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(1, 40))
def test_slices_cover_a_tensor_once_and_are_small(shape, most):
    tensor = torch.zeros(shape)
    for place in slices(tuple(shape), most):
        assert tensor[place].numel() <= most
        tensor[place] += 1
    assert tensor.numel() == 0 or tensor.min() == tensor.max() == 1


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
    """The largest read, as safetensors answers it, and the same verdict as from one read."""
    path = make_model(tmp_path / "model", {"wide.weight": torch.randn(3, 9000), "tall.weight": torch.randn(9000, 3)})
    whole = found_in(path)
    reads = []
    original = shards._pieces

    def recorded(shard, tensor, piece):
        for part in original(shard, tensor, 1000):
            reads.append(part.numel())
            yield part

    monkeypatch.setattr(shards, "_pieces", recorded)
    in_pieces = found_in(path)
    assert max(reads) <= 1000 < 27_000
    assert sum(reads) == 54_000
    for one, other in zip(whole["tensors"], in_pieces["tensors"], strict=True):
        assert one["counts"] == other["counts"]
        assert one["fp16_error"] == pytest.approx(other["fp16_error"], rel=1e-9)
