"""What the command preflight refuses: one message that names the thing and the fix, and no verdict."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from preflight_models import INDEX, TENSORS, make_model, preflight
from safetensors.torch import save_file
from typer.testing import CliRunner

from verl_fp16.cli.app import app
from verl_fp16.preflight.refusals import ModelError
from verl_fp16.preflight.shards import open_model, read


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


def a_dead_link(path: Path) -> Path:
    path.symlink_to(path.with_name("gone"))
    return path


def of_a_dead_config(path: Path) -> Path:
    file = make_model(path) / "config.json"
    file.unlink()
    file.symlink_to(path / "blob")
    return path


def a_config(path: Path) -> Path:
    return make_model(path) / "config.json"


def an_index(path: Path) -> Path:
    return make_model(path, shard_of=lambda name: f"model-{len(name) % 2}.safetensors") / INDEX


def a_folder_for_a_shard(path: Path) -> Path:
    (make_model(path) / "model.safetensors").rename(path / "one.safetensors")
    (path / "other.safetensors").mkdir()
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
    of_a_dead_link: ("model.safetensors: it is a link to ", "blob, which is not there. Mend the link, or download"),
    a_dead_link: ("model: it is a link to ", "gone, which is not there. Mend the link"),
    of_a_dead_config: ("config.json: it is a link to ", "blob, which is not there. Mend the link, or download"),
    a_config: ("config.json: there are no weights in a .json file. Name its folder: ", "/model"),
    an_index: (f"{INDEX}: there are no weights in a .json file. Name its folder: ", "/model"),
    a_folder_for_a_shard: ("other.safetensors: it cannot be read (Is a directory)", "Move the folder elsewhere"),
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
    with_a_tensor("model.rope.freqs_cis", torch.ones(4, dtype=torch.complex64)): (
        "model.rope.freqs_cis is stored as C64: float16 has no complex numbers",
        "Name a model whose weights are real",
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
    (message,) = [line for line in result.stderr.splitlines() if "reading" not in line]
    if options:
        assert json.loads(result.stdout) == {"verdict": None, "error": message.removeprefix("verl-fp16: ")}
    else:
        assert result.stdout == ""
    assert message.startswith(f"verl-fp16: {tmp_path}")
    assert [text for text in REFUSED[make] if text not in message] == []


@pytest.mark.parametrize("name", ("..", ".", "config.json", "model.safetensors"))
def test_what_may_not_be_read(name, tmp_path):
    path = make_model(tmp_path / "my models" / "small")
    barred = (path / name).resolve()
    barred.chmod(0)
    if os.access(barred, os.R_OK):
        pytest.skip("this user may read everything")
    result = preflight(path)
    barred.chmod(0o700)
    assert result.exit_code == 3
    file = path if name == ".." else barred
    told = f"{file}: there is no permission to read it. The owner can give it: chmod a+rX '{barred}'"
    assert result.stderr == f"verl-fp16: {told}\n"


def test_the_name_of_a_hub_model_says_how_to_download_it():
    result = CliRunner().invoke(app, ["preflight", "Qwen/Qwen3-0.6B"])
    assert result.exit_code == 3
    assert "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B" in result.stderr


@pytest.mark.parametrize("arguments", ((), ("model", "--unknown"), ("a", "b")))
def test_a_wrong_call_is_no_verdict_either(arguments):
    result = CliRunner().invoke(app, ["preflight", *arguments])
    assert result.exit_code == 3
    assert "Usage" in result.stderr


def test_a_file_that_goes_away_while_it_is_read(tmp_path):
    path = make_model(tmp_path / "model")
    model = open_model(path)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="model.safetensors: safetensors cannot read it"):
        for _, pieces in read(model):
            list(pieces)


def test_without_torch_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "verl_fp16.preflight.shards", None)
    result = preflight(make_model(tmp_path / "model"))
    assert result.exit_code == 3
    assert "torch and safetensors are needed" in result.stderr


def test_data_in_the_models_place_is_not_said_to_be_damaged(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1" * 100)
    with pytest.raises(ModelError, match=r"train.parquet: this is no model. Name a Hugging Face model folder or a"):
        open_model(tmp_path / "train.parquet")
