"""What the quickstart does with its input before anything is made, and with a run's outcome."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from verl_fp16.quickstart import __main__ as quickstart
from verl_fp16.supervise import RunResult


@pytest.mark.parametrize(
    ("overrides", "message"),
    (
        (["precision=bf16"], "use --precision"),
        (["quickstart_dir=/elsewhere"], "use --output"),
        (["data.seed=7"], "use --seed"),
        (["trainer.total_steps=3"], "trainer.total_steps"),
        (
            ["trainer.total_training_steps=null"],
            "trainer.total_training_steps must be an integer of at least 1, got None",
        ),
        (["trainer.total_training_steps=0"], "at least 1, got 0"),
        (["trainer.total_training_steps='???'"], "trainer.total_training_steps"),
        (["trainer.test_freq=0.5"], "trainer.test_freq must be an integer"),
        (["~trainer.val_before_train"], "trainer.val_before_train must be true or false"),
        (["trainer.logger=[console]"], "trainer.logger must name 'file'"),
        (["verl_fp16.loss_scale.init=abc"], "verl_fp16.loss_scale.init=abc\n   why: must be a finite number"),
        (["a=("], "a=("),
    ),
)
def test_a_wrong_override_is_named(overrides, message):
    with pytest.raises(quickstart.WrongInput) as caught:
        quickstart.make_plan("fp16", 1, None, overrides)
    assert message in str(caught.value)


def test_an_unknown_precision_lists_the_known_ones():
    with pytest.raises(quickstart.WrongInput, match="bf16_train_fp32_rollout"):
        quickstart.make_plan("fp17", 1, None, [])


@pytest.mark.parametrize("name", ("plain", "a b", "a=b", "it's", "a,b", "(x){y}[z]", "ü#%"))
def test_any_folder_reaches_verl_as_it_is(tmp_path, name):
    from hydra import compose, initialize_config_module

    plan = quickstart.make_plan("bf16", 3, tmp_path / name, ["trainer.total_training_steps=25"])
    assert (plan.steps, plan.validations, plan.folder) == (25, 4, tmp_path / name)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("quickstart", overrides=list(plan.overrides))
    assert config.data.train_files == str(tmp_path / name / "data" / "train.parquet")
    assert (config.data.seed, config.actor_rollout_ref.rollout.dtype) == (3, "bfloat16")


@pytest.mark.parametrize("name", ("back\\slash", "${dollar}", "new\nline"))
def test_a_folder_that_hydra_cannot_take_is_refused(tmp_path, name):
    with pytest.raises(quickstart.WrongInput, match="choose another with --output"):
        quickstart.make_plan("fp16", 1, tmp_path / name, [])


@pytest.mark.parametrize(("arguments", "message"), ((["--seed", "-5"], "--seed"), (["--seed", "x"], "--seed")))
def test_a_wrong_option_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        quickstart.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert quickstart.main(["--output", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "x"


def test_overrides_come_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("OVERRIDES", "a.b=[1,2] 'c=d e'")
    assert quickstart._parse(["--", "x=1"]).overrides == ["x=1", "a.b=[1,2]", "c=d e"]


def outcome(folder: Path, steps: int, logged: int, validation: bool, cause: str | None = None) -> tuple[int, dict, str]:
    """Exit code, summary and console text for a run that logged some steps."""
    plan = quickstart.Plan("fp16", 1, folder, (), steps, int(validation))
    rows = [{"step": 0, "data": {"val-core/written_sums/acc/mean@1": 0.3}}] if validation else []
    rows += [{"step": k, "data": {"actor/entropy": 0.5, "critic/score/mean": 0.4}} for k in range(1, logged + 1)]
    if validation and logged:
        rows[-1]["data"]["val-core/written_sums/acc/mean@1"] = 0.7
    plan.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = Console(record=True, width=100)
    result = RunResult(0 if cause is None else 1, 1.0, cause, plan.log)
    code = quickstart.finish(plan, {}, result, 1.0, console)
    return code, json.loads((folder / "summary.json").read_text()), console.export_text()


def test_outcomes(tmp_path):
    code, summary, text = outcome(tmp_path, 3, 3, validation=True)
    assert (code, summary["completed"], summary["accuracy_after"]) == (0, True, 0.7)
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert outcome(tmp_path, 3, 3, validation=False)[0] == 0, "a run without validation is no failed run"
    code, _, text = outcome(tmp_path, 3, 2, validation=True)
    assert code == 1
    assert "verl logged 2 of 3 steps" in text
    code, summary, text = outcome(tmp_path, 3, 2, validation=True, cause="worker X went away")
    assert (code, summary["completed"], summary["cause"]) == (1, False, "worker X went away")
    assert "worker X went away" in text
