"""A shipped recipe, copied and edited as a user does it, is that recipe with the edit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipe_readers import NAMES, yaml_parsed_once
from typer.testing import CliRunner

from verl_fp16.cli.app import app
from verl_fp16.config_difference import Composed, compose
from verl_fp16.installed import find_verl
from verl_fp16.recipe_files import find_recipe

FLAG = "  - precision: fp16\n"


@pytest.fixture(autouse=True, scope="module")
def parsed_once() -> Iterator[None]:
    with yaml_parsed_once():
        yield


def copied(name: str, file: Path) -> str:
    done = CliRunner().invoke(app, ["recipes", "copy", name, str(file)])
    assert done.exit_code == 0, done.output
    text = file.read_text()
    assert text.count(FLAG) == 1
    return text


def with_steps(text: str, steps: int) -> str:
    """The recipe with another number of steps, under the ``trainer:`` that it has or one of its own."""
    line = f"trainer:\n  total_training_steps: {steps}\n"
    edited, found = re.subn(r"^trainer:\n", line, text, flags=re.MULTILINE)
    return edited if found else f"{text}\n{line}"


def composed(file: Path) -> Composed:
    return compose(find_verl().config_dir, (), find_recipe(str(file)))


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_takes_an_edit_and_another_precision(name, tmp_path):
    file = tmp_path / f"{name}.yaml"
    text = copied(name, file)
    file.write_text(with_steps(text, 7).replace(FLAG, "  - precision: bf16\n"))
    found = composed(file)
    assert found.findings == ()
    assert found.values["trainer"]["total_training_steps"] == 7
    assert found.values["verl_fp16"]["train_dtype"] == "bfloat16"
    assert found.values["actor_rollout_ref"]["rollout"]["dtype"] == "bfloat16"
    assert found.values["actor_rollout_ref"]["actor"]["fsdp_config"]["mixed_precision"]["param_dtype"] == "bfloat16"


HINTS = "# What is changed most often"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gsm8k")])
def test_what_a_copy_suggests_can_be_uncommented(name, tmp_path):
    file = tmp_path / "mine.yaml"
    before, marker, hints = copied(name, file).partition(HINTS)
    assert marker, "it suggests nothing"
    lines = [re.sub(r"^(\s*)# (\s*[\w.]+:)", r"\1\2", line) for line in hints.splitlines()]
    file.write_text(before + marker + "\n".join(lines) + "\n")
    found = composed(file)
    assert found.findings == ()
    assert found.values["actor_rollout_ref"]["model"]["path"] == "/your/model"
    assert found.values["data"]["train_files"] == "/your/data/train.parquet"
    assert found.values["trainer"]["logger"] == ["console", "file", "wandb"]
    assert "-my_model-" in found.values["trainer"]["default_local_dir"]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_without_the_flag_is_verl_as_it_is(name, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(copied(name, file).replace(FLAG, ""))
    found = composed(file)
    assert found.findings == ()
    assert "verl_fp16" not in found.values
    assert "mixed_precision" not in found.values["actor_rollout_ref"]["actor"]["fsdp_config"]
    assert found.values["actor_rollout_ref"]["rollout"]["dtype"] == "bfloat16"
    if name != "quickstart":  # which has a name of its own
        assert found.values["trainer"]["experiment_name"].endswith("-verl-verl")
