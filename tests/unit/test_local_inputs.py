"""Files that are not there are told before Ray starts, and nothing is said where they may be elsewhere."""

from __future__ import annotations

import copy
import os

import pytest
from typer.testing import CliRunner

from verl_fp16.cli.app import app
from verl_fp16.local_inputs import missing_gpus, missing_inputs

SUMS = {
    "quickstart_dir": "outputs/q",
    "recipe": {"task": "sums"},
    "data": {"train_files": "outputs/q/data/train.parquet", "val_files": ["outputs/q/data/validation.parquet"]},
    "actor_rollout_ref": {"model": {"path": "outputs/q/model"}},
    "critic": {"enable": None, "model": {"path": "~/models/nobody-has-this"}},
    "algorithm": {"adv_estimator": "grpo"},
    "trainer": {"nnodes": 1},
    "ray_kwargs": {"ray_init": {"num_cpus": None, "runtime_env": {}}},
}


def changed(**values):
    config = copy.deepcopy(SUMS)
    for key, value in values.items():
        node = config
        *parts, last = key.split("__")
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    return config


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for name in ("RAY_ADDRESS", "VERL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def missing(config):
    return missing_inputs(config, os.environ)


def test_each_missing_file_is_named_with_what_makes_it(folder):
    told = missing(SUMS)
    assert [line.partition(":")[0] for line in told] == ["data.train_files", "data.val_files", MODEL]
    assert all(line.endswith("Make it: python -m verl_fp16.quickstart.make outputs/q") for line in told)
    (folder / "outputs/q/data").mkdir(parents=True)
    for name in ("train", "validation"):
        (folder / f"outputs/q/data/{name}.parquet").touch()
    (folder / "outputs/q/model").mkdir()
    assert missing(SUMS) == []
    (told,) = missing(changed(algorithm__adv_estimator="gae"))
    assert told.startswith("critic.model.path: there is no ~/models/nobody-has-this.")


MODEL = "actor_rollout_ref.model.path"


def test_experts_and_data_sets_have_commands_of_their_own():
    told = missing(changed(actor_rollout_ref__model__path="outputs/q/model-moe"))
    assert all(line.endswith("quickstart.make outputs/q --experts") for line in told) and len(told) == 3
    config = changed(recipe__task="gsm8k", data_dir="d", data__train_files="d/train.parquet")
    del config["quickstart_dir"]
    assert "Make it: verl-fp16 data gsm8k PATH --output d" in missing(config)[0]
    config = changed(recipe__task="sanity", data_dir="d", data__train_files="d/train.parquet")
    assert "Make it: verl-fp16 sanity-set MODEL --data FILE --reward verl --output d, and" in missing(config)[0]


def test_no_command_is_named_that_would_make_another_file():
    config = changed(recipe__task="gsm8k", data_dir="d", data__train_files="/mine/train.parquet")
    told = missing({**config, "actor_rollout_ref": {"model": {"path": "/my/model"}}})
    mine = [line for line in told if "/mine/train.parquet" in line or "/my/model" in line]
    assert len(mine) == 2 and all("Make it" not in line for line in mine)


@pytest.mark.parametrize(
    "values",
    (
        {"trainer__nnodes": 2},
        {"ray_kwargs__ray_init__address": "auto"},
        {"ray_kwargs__ray_init__runtime_env__working_dir": "."},
    ),
)
def test_nothing_is_said_where_the_files_may_be_elsewhere(values):
    assert missing(changed(**values)) == []


def test_nothing_is_said_of_a_cluster_that_is_running(folder, monkeypatch):
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").touch()
    assert missing(SUMS) == []
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert len(missing(SUMS)) == 3
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert missing(SUMS) == []


@pytest.mark.parametrize("path", ("Qwen/Qwen3-0.6B", "gpt2", "hdfs://x/y/z", "s3://a/b/c"))
def test_a_hubs_model_and_a_remote_file_are_not_looked_for(path):
    values = {"data__train_files": "hdfs://a/b.parquet", "data__val_files": "data/*.parquet"}
    assert missing(changed(actor_rollout_ref__model__path=path, **values)) == []


def test_a_data_set_of_ones_own_may_read_anything():
    assert [line.partition(":")[0] for line in missing(changed(data__custom_cls={"path": "mine.py"}))] == [MODEL]


def test_a_start_is_refused_in_verls_launcher_only(monkeypatch):
    from omegaconf import OmegaConf

    from verl_fp16.hooks import driver
    from verl_fp16.refusal import GuardError

    config = OmegaConf.create(SUMS)
    driver.require_inputs(config)
    monkeypatch.setattr(driver, "in_launcher", lambda: True)
    with pytest.raises(GuardError, match=r"not there. Nothing was started.\ndata.train_files: there is no outputs/q"):
        driver.require_inputs(config)


def test_config_is_not_about_this_machine():
    assert CliRunner().invoke(app, ["config", "quickstart"]).stderr == ""


def gpus(root, count, **values):
    (root / "dev").mkdir(exist_ok=True)
    for number in range(count):
        (root / "dev" / f"nvidia{number}").touch()
    (root / "dev" / "nvidiactl").touch()
    return missing_gpus(changed(trainer__n_gpus_per_node=4, **values), os.environ, root)


@pytest.mark.parametrize(("there", "said"), ((0, "no GPU."), (1, "1 GPU."), (3, "3 GPUs."), (4, ""), (8, "")))
def test_too_few_gpus_are_told(there, said, folder):
    told = gpus(folder, there)
    assert len(told) == bool(said)
    assert all(f"trainer.n_gpus_per_node=4: this machine has {said}" in line for line in told)


@pytest.mark.parametrize(
    "values",
    (
        {"trainer__device": "cpu"},
        {"trainer__nnodes": 2},
        {"ray_kwargs__ray_init__address": "auto"},
        {"ray_kwargs__ray_init__num_gpus": 4},
    ),
)
def test_nothing_is_said_of_gpus_where_it_cannot_be_known(values, folder):
    assert gpus(folder, 0, **values) == []


@pytest.mark.parametrize(
    "device", ("dev/kfd", "dev/dxg", "dev/davinci0", "proc/driver/nvidia/capabilities/gpu0/mig/gi1")
)
def test_gpus_that_are_counted_in_another_way_are_left_to_ray(device, folder):
    (folder / device).mkdir(parents=True)
    assert gpus(folder, 0) == []


def test_a_platform_that_is_named_is_left_to_verl(folder, monkeypatch):
    assert len(gpus(folder, 0)) == 1
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert gpus(folder, 0) == []
