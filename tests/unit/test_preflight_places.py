"""What somebody may name to preflight: shards, adapters, verl's checkpoints, models of the hub."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

import pytest
import torch
from preflight_models import INDEX, TENSORS, found_in, make_model, preflight
from safetensors.torch import save_file

WITHOUT_CONFIG = "no config.json: architecture and quantization were not checked"
ADAPTER = "this is a LoRA adapter: check its base model too"
PART = "1 of 4 shards looked at: name the folder for the whole model"


def in_shards(path: Path, first: int = 1) -> Path:
    """Four shards, and no index that says so."""
    places = {name: f"model-{first + number % 4:05}-of-00004.safetensors" for number, name in enumerate(TENSORS)}
    make_model(path, shard_of=places.get)
    (path / INDEX).unlink()
    return path


@pytest.mark.parametrize("first", (0, 1))
def test_all_shards_count_without_an_index(first, tmp_path):
    found = found_in(in_shards(tmp_path / "model", first))
    assert (found["verdict"], found["notes"], len(found["tensors"])) == ("FIT", [], 5)


@pytest.mark.parametrize(
    ("gone", "more"), (((2,), ""), ((2, 4), " (and 1 more of 4)"), ((1, 2, 3), " (and 2 more of 4)"))
)
def test_a_shard_that_is_missing_without_an_index(gone, more, tmp_path):
    path = in_shards(tmp_path / "model")
    for number in gone:
        (path / f"model-0000{number}-of-00004.safetensors").unlink()
    result = preflight(path)
    assert result.exit_code == 3
    name = f"model-0000{gone[0]}-of-00004.safetensors"
    told = f"{path}: {name} is missing{more}: the model is incomplete. Download or save the model again"
    assert result.stderr == f"verl-fp16: {told}\n"


def test_shards_of_two_savings_are_each_to_be_complete(tmp_path):
    path = in_shards(tmp_path / "model")
    save_file({"other.weight": torch.ones(3)}, path / "model-00001-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors is missing: " in preflight(path).stderr


def test_a_shard_by_itself_says_that_it_is_one_of_several(tmp_path):
    path = in_shards(tmp_path / "model") / "model-00003-of-00004.safetensors"
    assert found_in(path)["notes"] == [PART]
    result = preflight(path)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, f"note: {PART}")
    only = path.rename(path.with_name("model-00001-of-00001.safetensors"))
    assert found_in(only)["notes"] == []


def test_without_a_config_it_says_what_was_not_checked(tmp_path):
    path = make_model(tmp_path / "model")
    assert found_in(path)["notes"] == []
    (path / "config.json").unlink()
    for named in (path, path / "model.safetensors"):
        assert found_in(named)["notes"] == [WITHOUT_CONFIG]
        result = preflight(named)
        assert result.exit_code == 0
        assert result.stdout.splitlines()[-2:] == [
            "FIT for FP16, as far as its weights tell",
            f"note: {WITHOUT_CONFIG}",
        ]


@pytest.mark.parametrize("kind", (None, 7))
def test_a_config_that_names_no_architecture(kind, tmp_path):
    found = found_in(make_model(tmp_path / "model", model_type=kind))
    assert (found["verdict"], found["notes"]) == (
        "FIT",
        ["no model_type in config.json: the architecture was not checked"],
    )


def test_an_adapter_says_that_it_is_none_without_its_base_model(tmp_path):
    save_file({"a.lora_A.weight": torch.ones(3)}, tmp_path / "adapter_model.safetensors")
    assert found_in(tmp_path / "adapter_model.safetensors")["notes"] == [WITHOUT_CONFIG, ADAPTER]
    (tmp_path / "adapter_config.json").write_text("{}")
    assert found_in(tmp_path)["notes"] == [WITHOUT_CONFIG, ADAPTER]
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "lora.safetensors")
    assert found_in(tmp_path)["notes"] == [WITHOUT_CONFIG, ADAPTER]
    # A whole model beside which an adapter lies.
    make_model(tmp_path)
    assert found_in(tmp_path)["notes"] == []


def checkpoint(path: Path, *files: str) -> Path:
    """What verl saves of an actor."""
    make_model(path / "huggingface")
    (path / "huggingface" / "model.safetensors").unlink()
    for file in files:
        (path / file).write_text("")
    return path


RANK = "model_world_size_2_rank_0.pt"


@pytest.mark.parametrize(
    ("files", "named"),
    (
        (("fsdp_config.json", RANK), "."),
        (("fsdp_config.json",), "."),
        ((RANK,), "."),
        ((RANK,), RANK),
        (("fsdp_config.json", "optim_world_size_2_rank_1.pt"), "optim_world_size_2_rank_1.pt"),
        ((RANK,), "huggingface"),
        ((RANK,), ".."),
    ),
)
def test_verls_checkpoints_have_to_be_merged(files, named, tmp_path):
    actor = checkpoint(tmp_path / "it's a run" / "global_step_3" / "actor", *files)
    path = (actor / named).resolve()
    result = preflight(path)
    assert result.exit_code == 3
    told, command = result.stderr.split(" merge it first: ")
    assert told == f"verl-fp16: {path}: this is a verl checkpoint:"
    words = "python -m verl.model_merger merge --backend fsdp --local_dir".split()
    assert shlex.split(command) == [*words, str(actor), "--target_dir", f"{actor}-merged"]


def test_a_checkpoint_that_was_exported_as_well(tmp_path):
    actor = checkpoint(tmp_path / "global_step_3" / "actor", "fsdp_config.json", RANK)
    make_model(actor / "huggingface")
    assert preflight(actor / "huggingface").exit_code == 0
    for named in (actor, actor / RANK):
        told = f"{named}: this is a verl checkpoint, and its weights are exported too. Name {actor / 'huggingface'}"
        assert preflight(named).stderr == f"verl-fp16: {told}\n"


def test_how_to_convert_pickled_weights_whatever_the_folder_is_called(tmp_path):
    path = make_model(tmp_path / """it's "my" model""")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    command = preflight(path).stderr.partition("Convert them: ")[2]
    python, option, code, source, target = shlex.split(command)
    assert (python, option, source, target) == ("python", "-c", str(path), f"{path}-safetensors")
    assert "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])" in code
    compile(code, "command", "exec")


@pytest.mark.parametrize(
    ("named", "of_the_hub"),
    (
        ("Qwen/Qwen3-0.6B", True),
        ("org/model.v2", True),
        ("sharded/model-00002-of-00006.safetensors", False),
        ("org/model.bin", False),
        ("org/model.pt", False),
        ("here/model", False),
        ("../model", False),
        ("a/b/c", False),
        ("model", False),
        ("my models/model", False),
        ("/model", False),
    ),
)
def test_only_what_looks_like_a_name_of_the_hub_is_to_be_downloaded(named, of_the_hub, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    told = preflight(Path(named)).stderr
    assert told.startswith(f"verl-fp16: {named}: there is no such file or folder. Name a Hugging Face model folder")
    assert (f"hf download {named} --local-dir" in told) == of_the_hub


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where org/small of the hub would be cached; whoever wants the network fails."""

    def connect(*arguments):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "cache" / "models--org--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    return repository / "snapshots" / "c0ffee"


def test_a_model_in_the_cache_needs_no_download(cache):
    make_model(cache)
    found = found_in(Path("org/small"))
    assert (found["verdict"], found["model"]) == ("FIT", str(cache))
    assert found["notes"] == [f"read from the Hugging Face cache: {cache}"]
    make_model(Path("org/small"), {"here.weight": torch.ones(3)})
    assert (found_in(Path("org/small"))["model"], found_in(Path("org/small"))["notes"]) == ("org/small", [])


def test_a_model_of_which_the_cache_has_no_weights(cache):
    assert "hf download org/small --local-dir small" in preflight(Path("org/small")).stderr
    make_model(cache)
    (cache / "model.safetensors").unlink()
    told = "org/small: the Hugging Face cache has it without weights. Download them: hf download org/small"
    assert preflight(Path("org/small")).stderr == f"verl-fp16: {told}\n"
    (cache / "pytorch_model.bin").write_text("")
    assert "its weights are pytorch_model.bin" in preflight(Path("org/small")).stderr
