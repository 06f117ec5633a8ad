"""Where the runs of a sweep write to, and which of them are refused for one place of two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl_fp16.refusal import Refused
from verl_fp16.sweep_places import places_of, refuse_shared


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(name: Any = "run", folder: str | None = None, logger: Any = ("file",), **trainer: Any) -> Any:
    """A configuration of verl's that keeps no checkpoints."""
    own = {"project_name": "mine", "experiment_name": name, "logger": logger, "save_freq": -1, **trainer}
    return OmegaConf.create({"trainer": {**own, "default_local_dir": folder or f"checkpoints/{name}"}})


def said(*configs: Any, folders: tuple[str, ...] = ("out/0", "out/1", "out/2"), **environment: str) -> str | None:
    """What is said against a sweep of these runs, which are told as a=0, a=1 and so on."""
    own = [places_of(one, folder, environment) for one, folder in zip(configs, folders, strict=False)]
    try:
        refuse_shared([f"a={number}" for number in range(len(configs))], own)
    except Refused as error:
        return str(error)
    return None


def test_runs_of_their_own_names_pass():
    assert said(config("x"), config("y"), config(3)) is None


def test_another_program_has_no_such_places():
    unresolved = {"default_local_dir": "${nothing}", "logger": ["file"]}
    odd = {"default_local_dir": 3, "logger": True, "project_name": "p", "experiment_name": "e"}
    for other in ({}, {"trainer": "none"}, {"trainer": unresolved}, {"trainer": odd}):
        assert said(OmegaConf.create(other), OmegaConf.create(other)) is None


def test_one_log_is_refused_though_nothing_is_saved():
    told = said(config("x"), config("same", "c/1"), config("same", "c/2"))
    assert "the runs a=1 and a=2 would share their metrics (file) (trainer.logger=file -> ./mine/same.jsonl)" in told
    assert "trainer.experiment_name=lr-$" in told and "save_freq" not in told


@pytest.mark.parametrize("logger", ("tensorboard", ("console", "tensorboard")))
def test_one_folder_of_tensorboard_is_refused(logger):
    assert "tensorboard_log/mine/same" in said(*(config("same", folder, logger) for folder in "pq"))


@pytest.mark.parametrize("logger", ("console", ("console", "wandb"), (), None))
def test_one_name_is_no_file_of_other_loggers(logger):
    assert said(*(config("same", folder, logger) for folder in "pq")) is None


def test_names_that_make_one_path_are_one_log():
    one, other = config("b/c", "p", project_name="a"), config("c", "q", project_name="a/b")
    assert "a/b/c.jsonl" in said(one, other)


def test_a_folder_has_many_names(tmp_path):
    (tmp_path / "link").symlink_to("x")
    for name in ("x", "./x/", "y/../x", str(tmp_path / "x"), "link"):
        told = said(config("p", "x"), config("q", name))
        assert f"their checkpoints and evidence (trainer.default_local_dir={name})" in told
    assert "hdfs://host/x" in said(config("p", "hdfs://host/x"), config("q", "hdfs://host/x/"))


@pytest.mark.parametrize("key", ("rollout_data_dir", "validation_data_dir"))
def test_dumped_answers_are_written_over_too(key):
    assert f"trainer.{key}=dump" in said(*(config(name, **{key: "dump"}) for name in "pq"))
    assert said(*(config(name, **{key: None}) for name in "pq")) is None


def test_all_that_two_runs_share_is_told_at_once():
    told = said(config("same"), config("same"), folders=("out/x", "out/./x"))
    for place in ("hydra.sweep.subdir -> out/./x", "default_local_dir=checkpoints/same", "mine/same.jsonl"):
        assert place in told
    assert told.count("Name them") == 1 and "Leave hydra.sweep.subdir out" in told


@pytest.mark.parametrize(
    ("logger", "variable"), (("file", "VERL_FILE_LOGGER_PATH"), ("tensorboard", "TENSORBOARD_DIR"))
)
def test_a_variable_that_names_one_log_for_all_is_refused(logger, variable, tmp_path):
    runs = [config(name, logger=[logger]) for name in "pq"]
    told = said(*runs, **{variable: "all"})
    assert f"trainer.logger={logger} -> all" in told and f"Unset {variable}" in told
    os.mkfifo(tmp_path / "pipe")
    assert said(*runs, **{variable: "pipe"}) is None, "nothing is written over there"


def test_the_log_s_root_is_taken_from_its_variable(tmp_path):
    (place,) = [
        place for place in places_of(config(), "out", {"VERL_FILE_LOGGER_ROOT": "logs"}) if "file" in place.told
    ]
    assert Path(place.path) == tmp_path / "logs" / "mine" / "run.jsonl"


def test_in_folders_of_their_own_relative_places_are_their_own():
    runs = [config("same") for _ in range(2)]
    for one in runs:
        OmegaConf.update(one, "hydra.job.chdir", True, force_add=True)
    assert said(*runs) is None
    for one in runs:
        one.trainer.default_local_dir = "/x"
    assert "default_local_dir=/x" in said(*runs)
