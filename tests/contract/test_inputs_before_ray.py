"""Data and a model that are not there: verl's launcher says so before Ray starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from verl_fp16.installed import find_verl


def launched(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """verl's launcher, which stops before Ray since there is neither a model nor data."""
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *arguments],
        cwd=folder,
        env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "ray init kwargs" not in done.stdout, "Ray was about to start"
    assert "Traceback" not in done.stderr
    return done


def test_a_misspelt_key_of_a_copied_recipe_is_warned_of(tmp_path):
    recipe = "defaults: [quickstart, _self_]\nquickstart_dir: mine\ntrainer: {total_epoch: 3}\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    done = launched(tmp_path, "--config-dir", str(tmp_path), "--config-name", "mine")
    assert "trainer.total_epoch=3" in done.stderr
    assert "did you mean trainer.total_epochs?" in done.stderr
    assert done.stderr.count("no such key") == 1


def test_verls_own_configuration_may_lie_on_the_search_path_alone(tmp_path):
    """As in verl's examples, whose files name its folder; and as it can be named on the command line."""
    folder = find_verl().config_dir
    recipe = (
        "defaults: [ppo_trainer, precision: fp16, _self_]\ndata: {train_files: no.parquet, val_files: no.parquet}\n"
    )
    recipe += "actor_rollout_ref: {model: {path: no/model/here}}\ntrainer: {total_epoch: 3}\n"
    named = f"hydra: {{searchpath: ['file://{folder}']}}\n"
    (tmp_path / "named.yaml").write_text(recipe + named)
    (tmp_path / "bare.yaml").write_text(recipe)
    for name, override in (("named", "trainer.nnodes=1"), ("bare", f"hydra.searchpath=['file://{folder}']")):
        done = launched(tmp_path, "--config-path", str(tmp_path), "--config-name", name, override)
        assert "data.train_files: there is no no.parquet" in done.stderr, done.stderr
        assert "did you mean trainer.total_epochs?" in done.stderr


def test_an_override_that_takes_another_keys_value_is_read_as_it_was_written(tmp_path):
    """Of a node, and of what Hydra's grammar could not read again."""
    correction = "algorithm.rollout_correction"
    overrides = (
        f"+actor_rollout_ref.actor.policy_loss.rollout_correction=${{{correction}}}",
        f"+{correction}.rollout_iss=token",
        "data.custom_cls.path='a (b).py'",
        "data.custom_cls.name=${data.custom_cls.path}",
    )
    done = launched(tmp_path, "--config-name", "quickstart", "quickstart_dir=mine", *overrides)
    assert "python -m verl_fp16.quickstart.make mine" in done.stderr
    assert f"did you mean {correction}.rollout_is?" in done.stderr


def test_what_is_not_there_is_told_with_the_command_that_makes_it(tmp_path):
    done = launched(tmp_path, "--config-name", "quickstart", "quickstart_dir=mine")
    assert "verl does not know" not in done.stderr and "no such key" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.endswith("python -m verl_fp16.quickstart.make mine")]
    assert [line.partition(":")[0] for line in told] == [
        "data.train_files",
        "data.val_files",
        "actor_rollout_ref.model.path",
    ]
