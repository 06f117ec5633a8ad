"""`verl-fp16 run`: what is started, with which environment, and which exit code comes back."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from verl_fp16 import installed
from verl_fp16.cli.app import app
from verl_fp16.installed import InstalledVerl
from verl_fp16.launch import LaunchError, launch_environment, plan_launch
from verl_fp16.recipe_files import Recipe, find_recipe

OLD, NEW = (InstalledVerl(version, Path("/verl")) for version in ("0.8.0", "0.9.1"))
OURS = "verl_fp16.plugin,verl_fp16.cpu.plugin"
KEY = "ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES"
SHIPPED = find_recipe("quickstart")
REAL_VERL = installed.find_verl
LAUNCHER = (sys.executable, "-m", "verl.trainer.main_ppo")


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["run", *arguments])


@pytest.fixture
def started(monkeypatch):
    """What `run` would have become, instead of becoming it."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda path, arguments, environment: calls.append((arguments, environment)))
    monkeypatch.setattr(installed, "find_verl", lambda: NEW)
    return calls


def test_hydra_arguments_pass_through_untouched_and_in_order(started):
    arguments = ["+mine=cpu", "~data.seed", "--cfg", "job", "-p", "trainer", "--resolve", "a='b, c'", "+x={y: 1}"]
    assert invoke("quickstart", *arguments).exit_code == 0
    command, environment = started.pop()
    assert tuple(command) == (*LAUNCHER, "--config-name", "quickstart", *arguments)
    assert environment == dict(os.environ)


def test_our_options_may_stand_anywhere(started, monkeypatch):
    monkeypatch.setattr(installed, "find_verl", REAL_VERL)
    result = invoke("quickstart", "data.seed=1", "--dry-run", "--cfg", "job")
    assert shlex.split(result.stdout)[-3:] == ["data.seed=1", "--cfg", "job"]
    assert (started, result.stderr) == ([], "")


DRY_RUN_REFUSALS = (
    (("algo=grpo_seq_miss",), "did you mean algo=grpo_seq_mis?"),
    (("unknown.key=1",), "verl's configuration has no such key"),
    (("actor_rollout_ref.rollout.dtype=float32",), "1 setting contradicts the precision flag"),
    (("+precison=bf16",), "did you mean precision=bf16?"),
    (("--cfg", "nothing"), "Hydra does not take the options --cfg"),
    (("--bogus=3",), "Hydra does not take the options --bogus=3"),
    (("-m", "precision=fp16,fp17"), "precision=fp17: In 'gsm8k_grpo': there is no precision=fp17"),
)


@pytest.mark.parametrize(("arguments", "message"), DRY_RUN_REFUSALS)
def test_a_dry_run_says_what_a_start_would_be_refused_for(arguments, message, started, monkeypatch):
    monkeypatch.setattr(installed, "find_verl", REAL_VERL)
    result = invoke("gsm8k_grpo", *arguments, "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_dry_run_warns_as_config_does(started, monkeypatch):
    monkeypatch.setattr(installed, "find_verl", REAL_VERL)
    result = invoke("gsm8k_grpo", "+trainer.total_epoch=3", "--dry-run")
    assert result.exit_code == 0
    assert "did you mean trainer.total_epochs?" in result.stderr


def test_a_dry_run_of_a_sweep_lists_its_runs(started, monkeypatch):
    monkeypatch.setattr(installed, "find_verl", REAL_VERL)
    result = invoke("precision_ablation", "--dry-run")
    assert (result.exit_code, "a sweep of 5 runs" in result.stderr) == (0, True)
    listed = [line.split()[1] for line in result.stderr.splitlines()[1:]]
    members = ("fp16", "bf16", "bf16_train_fp16_rollout", "bf16_train_fp32_rollout", "fp32")
    assert listed == [f"precision={member}" for member in members]
    node = "+actor_rollout_ref.actor.policy_loss.rollout_correction=${algorithm.rollout_correction}"
    written = invoke("precision_ablation", node, "--dry-run")
    key = node.partition("=")[0]
    assert (written.exit_code, written.stderr.count(f" {key}=$")) == (0, 5), "as it was written, not as it is resolved"
    assert "sweep" not in invoke("precision_ablation", "hydra.mode=RUN", "--dry-run").stderr
    assert "sweep" not in invoke("precision_ablation", "--cfg", "job", "--dry-run").stderr


@pytest.mark.parametrize("arguments", (("--multirun", "--cfg", "job"), ("-m", "--info"), ("--cfg=job", "--run")))
def test_options_of_hydras_that_exclude_each_other_are_one_line(arguments, started):
    result = invoke("gsm8k_grpo", *arguments)
    assert (result.exit_code, result.stderr.count("\n"), started) == (2, 1, [])
    assert "exclude each other" in result.stderr


def test_after_two_dashes_everything_is_hydras(started):
    assert invoke("quickstart", "--", "--dry-run").exit_code == 0
    assert started[0][0][-1] == "--dry-run"


def test_an_own_recipe_goes_before_the_shipped_one_of_its_name(tmp_path):
    path = tmp_path / "quickstart.yaml"
    command = plan_launch(Recipe("quickstart", path, shipped=False), ["a=1"], NEW, {}).command
    folders = ("--config-path", str(tmp_path), "--config-dir", "/verl/trainer/config")
    assert command == (*LAUNCHER, *folders, "--config-name", "quickstart", "a=1")


@pytest.mark.parametrize(
    ("theirs", "expected"),
    (
        ("", OURS),
        ("mine", f"mine,{OURS}"),
        (" a , verl_fp16.cpu.plugin", "a,verl_fp16.cpu.plugin,verl_fp16.plugin"),
        (OURS, OURS),
    ),
)
def test_below_0_9_the_plugins_are_named_beside_the_users_modules(theirs, expected):
    environ = {"VERL_USE_EXTERNAL_MODULES": theirs}
    assert launch_environment(OLD, environ) == {"VERL_USE_EXTERNAL_MODULES": expected}
    assert launch_environment(NEW, environ) == {}


def test_below_0_9_they_also_reach_workers_that_do_not_inherit_the_environment():
    assert f"++{KEY}='{OURS}'" in plan_launch(SHIPPED, [], OLD, {}).command
    command = plan_launch(
        SHIPPED, [f"+{KEY}='theirs,{OURS}'", "x=1"], OLD, {"VERL_USE_EXTERNAL_MODULES": "mine"}
    ).command
    values = [argument for argument in command if KEY in argument]
    assert len(values) == 1, "Hydra refuses to append a key twice"
    assert set(values[0].partition("=")[2].strip("'").split(",")) == {"theirs", "mine", *OURS.split(",")}
    assert command[-1] == "x=1"


@pytest.mark.parametrize("flag", ("--config-name=x", "-cn", "--config-path", "-cp=x"))
def test_another_configuration_than_the_recipe_is_refused(flag):
    with pytest.raises(LaunchError, match="contradicts the recipe"):
        plan_launch(SHIPPED, [flag], NEW, {})


@pytest.mark.parametrize(
    ("override", "message"),
    (("+precision=bf16", "write precision=bf16, without +"), ("precision=null", "write ~precision")),
)
def test_a_group_that_is_misused_is_told_before_verl_starts(override, message, started):
    result = invoke("gsm8k_grpo", override)
    assert (result.exit_code, result.stderr.count("\n"), started) == (2, 1, [])
    assert message in result.stderr


def test_a_further_folder_is_hydras_business_only_where_the_recipe_needs_none(tmp_path):
    assert "--config-dir" in plan_launch(SHIPPED, ["--config-dir", "d"], NEW, {}).command
    with pytest.raises(LaunchError, match="hydra.searchpath"):
        plan_launch(Recipe("r", tmp_path / "r.yaml", shipped=False), ["--config-dir", "d"], NEW, {})


def test_what_cannot_be_started_is_said_in_one_line(started, monkeypatch):
    assert "did you mean quickstart?" in invoke("quickstar").stderr
    assert "belong to --supervised" in invoke("quickstart", "--timeout", "3").stderr

    def missing():
        raise installed.VerlNotFound("verl is not installed in this environment: install verl 0.9.1")

    monkeypatch.setattr(installed, "find_verl", missing)
    result = invoke("quickstart")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "install verl" in result.stderr
    assert started == []


@pytest.mark.parametrize(
    ("code", "options", "expected"),
    (
        ("print('from the child')", (), 0),
        ("print('from the child'); raise SystemExit(7)", (), 7),
        ("import os; print('from the child', flush=True); os.kill(os.getpid(), 15)", (), 143),
        ("import time; print('from the child', flush=True); time.sleep(60)", ("--timeout", "1"), 124),
    ),
)
def test_supervised_shows_the_log_and_returns_the_childs_exit_code(code, options, expected, tmp_path, monkeypatch):
    import verl_fp16.launch as launch

    monkeypatch.setattr(launch, "plan_launch", lambda *_: launch.Launch((sys.executable, "-c", code)))
    monkeypatch.setattr(installed, "find_verl", lambda: NEW)
    log = tmp_path / "folder" / "run.log"
    result = invoke("quickstart", "--supervised", "--log-file", str(log), *options)
    assert result.exit_code == expected
    assert "from the child" in result.stdout
    assert "from the child" in log.read_text()
    assert ("the whole log" in result.stderr) is (expected != 0)


SWEEPS = (
    ("quickstart", "--multirun"),
    ("quickstart", "-m", "precision=fp16,bf16"),
    ("quickstart", "--multi", "precision=fp16,bf16"),
    ("quickstart", "hydra.mode=MULTIRUN"),
    ("precision_ablation",),
    ("precision_ablation", "precision=fp16,bf16"),
)


@pytest.mark.parametrize("arguments", SWEEPS)
def test_a_sweep_is_not_supervised(arguments, started, monkeypatch):
    monkeypatch.setattr(installed, "find_verl", REAL_VERL)
    result = invoke(*arguments, "--supervised", "--dry-run")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "--supervised watches one run" in result.stderr
    assert invoke(*arguments, "--dry-run").exit_code == 0, "without it, it is Hydra's business"


def test_a_file_that_builds_on_a_sweep_is_one_and_a_run_of_a_sweep_is_none(tmp_path, started, monkeypatch):
    monkeypatch.setattr(installed, "find_verl", REAL_VERL)
    own = tmp_path / "mine.yaml"
    own.write_text("defaults: [precision_ablation, _self_]\n")
    assert "--supervised watches one run" in invoke(str(own), "--supervised", "--dry-run").stderr
    for recipe in (str(own), "precision_ablation"):
        result = invoke(recipe, "hydra.mode=RUN", "precision=bf16", "--supervised", "--dry-run")
        assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("arguments", (["--cfg", "nothing"], ["unknown.key=1"], ["a=[1"]))
def test_what_hydra_cannot_read_is_left_for_it_to_tell(arguments, started, monkeypatch):
    import verl_fp16.cli.run as run

    supervised = []
    monkeypatch.setattr(run, "_run_supervised", lambda command, *_: supervised.append(command) or 0)
    monkeypatch.setattr(installed, "find_verl", REAL_VERL)
    assert invoke("quickstart", *arguments, "--supervised").exit_code == 0
    assert list(supervised[0])[-len(arguments) :] == arguments


def planted_verl(folder: Path, version: str) -> Path:
    package = folder / "verl"
    (package / "version").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('verl must not be imported')")
    (package / "version" / "version").write_text(version + "\n")
    return package


@pytest.mark.parametrize(
    ("version", "supported", "entry_points"),
    (
        ("0.8.0", True, False),
        ("0.9.1", True, True),
        ("0.9.1.dev0", True, True),
        ("0.9.2", False, True),
        ("0.7.1", False, False),
        ("odd", False, True),
    ),
)
def test_verl_is_found_without_an_import_in_the_folder_where_the_child_finds_it(
    version, supported, entry_points, tmp_path, monkeypatch
):
    package = planted_verl(tmp_path, version)
    monkeypatch.chdir(tmp_path)
    verl = installed.find_verl()
    assert verl == InstalledVerl(version, package)
    assert (verl.supported, verl.reads_entry_points) == (supported, entry_points)


def test_a_folder_that_only_carries_the_name_is_not_verl(tmp_path, monkeypatch):
    package = planted_verl(tmp_path, "0.9.1")
    (package / "version" / "version").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(installed.VerlNotFound, match="not a verl that is known"):
        installed.find_verl()
