"""`verl-fp16 recipes` and what a recipe's name or path means."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from verl_fp16 import recipe_files
from verl_fp16.cli.app import app

ROOT = Path(__file__).parents[2]


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_list_has_every_shipped_recipe_with_its_first_comment_line():
    result = invoke("recipes", "list")
    rows = {name: rest for name, *rest in (line.split("\t") for line in result.stdout.splitlines())}
    assert set(rows) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert all(hardware and summary for hardware, summary in rows.values())
    assert rows["quickstart"][0] == "CPU" and rows["quickstart"][1].startswith("GRPO on written sums")
    assert rows["two_nodes"][0] == "2 x 8 GPUs"
    summaries = [summary for _, summary in rows.values()]
    assert [summary for summary in summaries if len(summary) < 15] == []
    twice = {summary for summary in summaries if summaries.count(summary) > 1}
    assert twice == set(), "a summary that two recipes share says nothing of either"


def test_a_group_is_no_recipe():
    folder = ROOT / "recipes"
    groups = {path.stem for path in folder.rglob("*.yaml") if path.parent != folder}
    assert len(groups) > 30
    for group in groups - {"two_nodes"}:  # a scale, and a recipe of that name
        with pytest.raises(recipe_files.RecipeError, match=f"unknown recipe '{group}'"):
            recipe_files.find_recipe(group)
    for path in ("task/sanity", "recipes/task/sanity"):
        with pytest.raises(recipe_files.RecipeError, match="no such recipe file"):
            recipe_files.find_recipe(path)


@pytest.mark.parametrize("text", ("a: 1\n# later\n", "", "\n\n"))
def test_a_recipe_without_a_comment_at_the_top_has_no_summary(text, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert recipe_files.find_recipe(str(path)).summary == ""


@pytest.mark.parametrize("text", ("", "a: [\n", "- a\n", "defaults:\n  - ppo_trainer\n  - scale: mine\n"))
def test_a_recipe_without_groups_of_ours_has_no_hardware(text, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert recipe_files.find_recipe(str(path)).hardware == ""


def test_copy_into_a_folder_and_to_a_file(tmp_path):
    original = (ROOT / "recipes" / "quickstart.yaml").read_bytes()
    result = invoke("recipes", "copy", "quickstart", str(tmp_path))
    assert result.exit_code == 0
    assert Path(result.stdout.strip()) == tmp_path / "quickstart.yaml"
    assert invoke("recipes", "copy", "quickstart", str(tmp_path / "new" / "mine.yaml")).exit_code == 0
    assert (tmp_path / "quickstart.yaml").read_bytes() == (tmp_path / "new" / "mine.yaml").read_bytes() == original


def test_copy_does_not_overwrite_unless_forced(tmp_path):
    target = tmp_path / "quickstart.yaml"
    target.write_text("mine")
    refused = invoke("recipes", "copy", "quickstart", str(target))
    assert refused.exit_code == 2
    assert f"{target} is there already" in refused.stderr
    assert target.read_text() == "mine"
    assert invoke("recipes", "copy", "quickstart", str(target), "--force").exit_code == 0
    assert target.read_text() != "mine"


def test_copy_refuses_a_name_that_hydra_would_not_read(tmp_path):
    result = invoke("recipes", "copy", "quickstart", str(tmp_path / "mine.yml"))
    assert result.exit_code == 2
    assert ".yaml only" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("quikstart", "did you mean quickstart?"),
        ("zzz", "shipped recipes: "),
        ("./no/such.yaml", "no such recipe file: "),
        ("own.yml", ".yaml only"),
        ("own", "write ./own.yaml"),
    ),
)
def test_what_is_no_recipe_is_refused_with_the_way_out(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own.yaml", "own.yml"):
        (tmp_path / name).touch()
    with pytest.raises(recipe_files.RecipeError) as caught:
        recipe_files.find_recipe(text)
    assert message in str(caught.value)


def test_the_file_hint_goes_before_the_shipped_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(recipe_files.RecipeError, match="unknown recipe 'mine': for the file in this folder write"):
        recipe_files.find_recipe("mine")


def test_a_shipped_name_with_an_ending_is_told_without_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("recipes", "copy", "gsm8k_grpo.yaml", "x.yaml")
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "the shipped recipe is called gsm8k_grpo" in result.stderr
    with pytest.raises(recipe_files.RecipeError, match="the shipped recipe is called gsm8k_grpo"):
        recipe_files.find_recipe("gsm8k_grpo.yaml")


def test_a_place_that_cannot_be_written_is_told_in_words(tmp_path):
    (tmp_path / "file").touch()
    for place in ("/proc/x/mine.yaml", str(tmp_path / "file" / "mine.yaml")):
        result = invoke("recipes", "copy", "gsm8k_grpo", place)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert f"cannot make the folder {Path(place).parent}: " in result.stderr
        assert "choose another place" in result.stderr and "Errno" not in result.stderr


def test_a_name_of_verls_own_is_refused(tmp_path):
    path = tmp_path / "ppo_trainer.yaml"
    result = invoke("recipes", "copy", "gsm8k_grpo", str(path))
    assert (result.exit_code, path.exists()) == (2, False)
    assert "ppo_trainer is verl's own configuration" in result.stderr
    path.write_text("defaults: [ppo_trainer, precision: fp16, _self_]\n")
    for command in ("config", "run"):
        result = invoke(command, str(path))
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert "rename it" in result.stderr


LACKING = (
    "defaults: [precision: fp16, algo: grpo, _self_]\n",
    "defaults: [_self_]\ntrainer: {nnodes: 1}\n",
    "defaults: [base, precision: fp16]\n",
    "trainer: {nnodes: 1}\n",
    "",
)


@pytest.mark.parametrize("text", LACKING)
def test_a_recipe_without_verls_configuration_is_told_only_that(text, tmp_path):
    (tmp_path / "base.yaml").write_text("defaults: [task: gsm8k]\n")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    for command in ("config", "run"):
        result = invoke(command, str(path))
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert "its defaults list lacks `- ppo_trainer`" in result.stderr


@pytest.mark.parametrize("first", ("ppo_trainer", "gsm8k_grpo", "base", "their/group", "{their: group}", "mine"))
def test_what_may_lead_to_verls_configuration_is_let_through(first, tmp_path):
    (tmp_path / "base.yaml").write_text("defaults: [ppo_trainer]\n")
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: [{first}, precision: fp16, _self_]\n")
    recipe_files.require_trainer(recipe_files.find_recipe(str(path)))
