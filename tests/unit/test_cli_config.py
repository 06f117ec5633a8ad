"""`verl-fp16 config`: composing beside a verl that is not imported, and comparing."""

from __future__ import annotations

import pytest
from hydra import initialize_config_dir
from typer.testing import CliRunner

from verl_fp16 import config_difference as difference
from verl_fp16 import installed
from verl_fp16.cli.app import app
from verl_fp16.installed import InstalledVerl
from verl_fp16.recipe_files import find_recipe
from verl_fp16.refusal import GuardError

PLAIN = """
data: {seed: null, files: [a, b], name: "1"}
trainer: {device: cuda, logger: "${oc.env:NOBODY_SETS_THIS}"}
"""


@pytest.fixture
def verl(tmp_path, monkeypatch) -> InstalledVerl:
    """The least that Hydra needs of a verl."""
    folder = tmp_path / "verl"
    (folder / "trainer" / "config").mkdir(parents=True)
    (folder / "trainer" / "config" / "ppo_trainer.yaml").write_text(PLAIN)
    found = InstalledVerl("0.9.1", folder)
    monkeypatch.setattr(installed, "find_verl", lambda: found)
    return found


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["config", *arguments])


def test_a_line_for_each_changed_key_with_tabs_and_nothing_cut(verl):
    long = "x" * 500
    result = invoke("data.seed=3", f"+new.key={long}", "~trainer.device", "data.name=1")
    assert result.exit_code == 0
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["data.seed", "null", "3"],
        ["data.name", "'1'", "1"],
        ["new.key", "(absent)", long],
        ["trainer.device", "cuda", "(absent)"],
    ]


def test_no_difference_is_said_beside_the_output(verl):
    result = invoke("data.seed=null")
    assert (result.stdout, result.exit_code) == ("", 0)
    assert "no difference" in result.stderr


def test_the_flag_is_shown_with_what_rides_to_each_role(verl):
    rows = {line.split("\t")[0]: line.split("\t")[2] for line in invoke("+precision=fp16").stdout.splitlines()}
    mixed = "actor_rollout_ref.actor.fsdp_config.mixed_precision"
    assert rows[f"{mixed}.param_dtype"] == rows["actor_rollout_ref.rollout.dtype"] == "float16"
    assert rows[f"{mixed}.verl_fp16.loss_scale.init"] == "65536.0"
    assert rows["actor_rollout_ref.ref.fsdp_config.mixed_precision.verl_fp16.loss_scale"] == "null"


def test_it_answers_where_the_hooks_are_switched_off(verl, monkeypatch):
    monkeypatch.setenv("VERL_FP16_DISABLE", "1")
    assert "verl_fp16.role\t(absent)\tactor" in invoke("+precision=fp16").stdout


def test_whole_and_diff(verl):
    whole = invoke("--all", "data.seed=3")
    assert "seed: 3\n" in whole.stdout
    assert "logger: ${oc.env:NOBODY_SETS_THIS}" in whole.stdout, "what cannot be resolved here stays as written"
    lines = invoke("--diff", "data.seed=3").stdout.splitlines()
    assert lines[:2] == ["--- verl", "+++ data.seed=3"]
    assert [line for line in lines[2:] if line[0] in "+-"] == ["-  seed: null", "+  seed: 3"]
    assert invoke("--diff", "--all", "a=1").exit_code == 2


def test_an_own_recipe_finds_verls_defaults_and_is_not_taken_for_the_shipped_one(verl, tmp_path):
    path = tmp_path / "it's mine" / "quickstart.yaml"
    path.parent.mkdir()
    path.write_text("defaults: [ppo_trainer, precision: fp16, _self_]\ndata: {seed: 5}\n")
    rows = invoke(str(path), "precision=bf16").stdout
    assert "data.seed\tnull\t5" in rows
    assert "verl_fp16.train_dtype\t(absent)\tbfloat16" in rows
    assert "quickstart_dir" not in rows


def test_a_recipe_that_is_not_yaml_is_named(verl, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("a: {b: [}\n")
    result = invoke(str(path))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "broken.yaml" in result.stderr


@pytest.mark.parametrize("where", ("recipe", "command line"))
def test_further_folders_on_the_search_path_are_kept(where, verl, tmp_path):
    (tmp_path / "more" / "flavour").mkdir(parents=True)
    (tmp_path / "more" / "flavour" / "sour.yaml").write_text("taste: lemon\n")
    path = tmp_path / "mine" / "mine.yaml"
    path.parent.mkdir()
    folder = f"file://{tmp_path}/more"
    in_recipe = f"hydra: {{searchpath: ['{folder}']}}\n" if where == "recipe" else ""
    path.write_text(f"defaults: [ppo_trainer, flavour: sour, _self_]\n{in_recipe}")
    overrides = [] if where == "recipe" else [f"hydra.searchpath=[{folder}]"]
    assert difference.compose(verl.config_dir, overrides, find_recipe(str(path))).values["flavour"] == {
        "taste": "lemon"
    }


@pytest.mark.parametrize(
    ("override", "message"),
    (
        ("precision=fp16", "use +precision=fp16"),
        ("+precison=fp16", "did you mean +precision=fp16?"),
        ("no_such_key=1", "no_such_key"),
        ("quikstart", "did you mean quickstart?"),
    ),
)
def test_what_cannot_be_composed_is_one_message(override, message, verl):
    result = invoke(override)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_wrong_settings_are_named(verl):
    with pytest.raises(GuardError, match=r"verl_fp16.loss_scale.init=0.1\n   why: must be at least"):
        difference.compose(verl.config_dir, ["+precision=fp16", "verl_fp16.loss_scale.init=0.1"])


def test_the_plugins_own_resolver_is_left_alone(verl, monkeypatch):
    """The command's answer must not stand in for the one that checks that the hooks are in place."""
    from hydra import compose

    from verl_fp16 import plugin

    plugin.require_active()
    asked = []
    monkeypatch.setattr(plugin, "require_active", lambda: asked.append(True))
    assert "verl_fp16.train_dtype" in invoke("+precision=fp16").stdout
    assert asked == []
    with initialize_config_dir(str(verl.config_dir), version_base=None):
        config = compose("ppo_trainer", overrides=["+precision=fp16"])
    assert config.critic.fsdp.mixed_precision.verl_fp16.role == "critic"
    assert asked


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    (
        ({"a": 1}, {"a": 1.0}, [("a", 1, 1.0)]),
        ({"a": {"b": 1}}, {"a": None}, [("a", difference.ABSENT, None), ("a.b", 1, difference.ABSENT)]),
        ({"a": {}}, {"a": {"b": [1]}}, [("a.b", difference.ABSENT, [1]), ("a", {}, difference.ABSENT)]),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}, []),
    ),
)
def test_changes(before, after, expected):
    assert [(c.key, c.theirs, c.ours) for c in difference.changes(before, after)] == expected


def test_a_contradiction_is_told_beside_what_is_shown():
    result = CliRunner().invoke(app, ["config", "+precision=fp16", "actor_rollout_ref.rollout.dtype=float32"])
    assert result.exit_code == 1
    assert "actor_rollout_ref.rollout.dtype" in result.stdout
    assert "1 setting contradicts the precision flag" in result.stderr
    result = CliRunner().invoke(app, ["config", "+precison=fp16"])
    assert (result.exit_code, "did you mean +precision=fp16?" in result.stderr) == (2, True)


@pytest.mark.parametrize("override", ("~verl_fp16", "~verl_fp16.loss_scale", "~verl_fp16.loss_scale.init"))
def test_what_an_override_tore_out_is_one_message(override):
    result = CliRunner().invoke(app, ["config", "+precision=fp16", override])
    assert (result.exit_code, result.exception.__class__) == (2, SystemExit)
    assert "verl_fp16" in result.stderr and "fix:" in result.stderr


@pytest.mark.parametrize("options", ((), ("--all",), ("--diff",)))
def test_a_key_that_verl_does_not_have_is_warned_of(options, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [gsm8k_grpo, _self_]\ntrainer: {total_epoch: 3}\ndata: {train_batchsize: 64}\n")
    result = CliRunner().invoke(app, ["config", str(path), *options])
    assert result.exit_code == 0
    assert "did you mean trainer.total_epochs?" in result.stderr
    assert "did you mean data.train_batch_size?" in result.stderr


def test_without_one_nothing_is_said(tmp_path):
    assert CliRunner().invoke(app, ["config", "gsm8k_grpo"]).stderr == ""


SLIPS = {
    "precision=null": "to drop the group write ~precision",
    "precision=": "to drop the group write ~precision",
    "+precision=bf16": "this recipe names the group already: write precision=bf16, without +",
    "precision=fp17": "did you mean precision=fp16? There are bf16, bf16_train_fp16_rollout, bf16_train_fp32_rollout,",
    "precision=16": "precision has no member 16: there are bf16, ",
    "precison=bf16": "did you mean precision=bf16?",
    "+precison=bf16": "did you mean precision=bf16?",
    "+trainer.precision=bf16": "did you mean precision=bf16?",
    "~precison": "did you mean ~precision?",
    "algo=grpo_seq_miss": "did you mean algo=grpo_seq_mis?",
    "algoo=dapo": "did you mean algo=dapo?",
    "+algoo=dapo": "did you mean algo=dapo?",
    "+base_modle=qwen3_14b": "did you mean base_model=qwen3_14b?",
    "trainer.total_epoch=3": "did you mean trainer.total_epochs=3? A key of your own: +trainer.total_epoch=3",
    "~trainer.total_epoch": "did you mean ~trainer.total_epochs?",
    "~trainer.x": "~trainer.x: there is no such key to delete.\n",
    "actor_rollout_ref.rollout.zzz=1": "verl's configuration has no such key. A key of your own: +actor_rollout_ref.",
    "trainers.total_epochs=3": "did you mean trainer.total_epochs=3?",
    "+alg=grpo": "did you mean algo=grpo? Where no recipe names the group: +algo=grpo.",
}


@pytest.mark.parametrize(("override", "message"), SLIPS.items())
def test_a_slip_beside_a_recipe_is_one_line_with_what_was_meant(override, message):
    result = CliRunner().invoke(app, ["config", "gsm8k_grpo", override])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert message in result.stderr
    assert "search path" not in result.stderr


def config_of(path, *overrides):
    return CliRunner().invoke(app, ["config", str(path), *overrides])


def test_a_key_of_ones_own_that_the_file_refers_to_is_no_slip(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [gsm8k_grpo, _self_]\nalg: grpo\ntrainer: {experiment_name: '${alg}-1'}\n")
    assert config_of(path).exit_code == 0


def test_a_configuration_that_is_written_out_is_a_recipe(tmp_path):
    path = tmp_path / "flat.yaml"
    path.write_text(config_of("gsm8k_grpo", "--all").stdout)
    found = config_of(path)
    assert (found.exit_code, "lacks" in found.stderr) == (0, False)


def test_a_group_of_ones_own_that_leads_nowhere_is_told_as_what_it_is(tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "small.yaml").write_text("# @package _global_\ntrainer: {nnodes: 1}\n")
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [precision: fp16, lab: small, _self_]\n")
    found = config_of(path)
    assert (found.exit_code, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert "its defaults list lacks `- ppo_trainer`" in found.stderr
    path.write_text("defaults: [ppo_trainer, precision: fp16, lab: small, _self_]\n")
    assert config_of(path).exit_code == 0


def test_a_group_that_the_recipe_below_names_is_written_without_plus(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [gsm8k_grpo, _self_]\n")
    found = config_of(path, "+precision=bf16")
    assert found.exit_code == 2
    assert "precision is named already: write precision=bf16, without +" in found.stderr


def test_a_misspelt_group_in_a_file_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    for group, hint in (("algoo", "did you mean algo: dapo?"), ("zzz", "precision, hardware, task, algo, base_model")):
        path.write_text(f"defaults: [ppo_trainer, precision: fp16, {group}: dapo, _self_]\n")
        result = CliRunner().invoke(app, ["config", str(path)])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert hint in result.stderr


@pytest.mark.parametrize("override", ("+dtype=bf16", "+algo_name=dapo", "+scales=3", "+precision_note=fp16"))
def test_a_key_of_ones_own_beside_the_flag_is_no_slip(override):
    assert CliRunner().invoke(app, ["config", "gsm8k_grpo", override]).exit_code == 0


def test_a_group_may_be_dropped_and_named_again():
    result = CliRunner().invoke(app, ["config", "gsm8k_grpo", "~precision"])
    assert (result.exit_code, "verl_fp16.train_dtype" in result.stdout) == (0, False)
