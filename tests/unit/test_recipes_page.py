"""The tables of recipes/README.md: labels come from result files, and a verdict from its numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import recipes_page

from verl_fp16.quickstart.report import StepMetrics
from verl_fp16.recipe_files import shipped_recipes

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import recipes_cpu  # noqa: E402


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes_page, "RESULTS", tmp_path)
    return tmp_path


def run(recipe, precision, last=0.9, error=0.01, gap=1e-4, steps=60):
    accuracy = {"accuracy_first": 0.4, "accuracy_last": last, "accuracy_last_standard_error": error}
    return {"recipe": recipe, "precision": precision, "steps": steps, "gap_mean": gap, "skipped_steps": 0, **accuracy}


def record(folder, compared=(), others=()):
    made = {"date": "today", "machine": "here", "versions": {"torch": "2"}, "command": "this", "last_steps": 10}
    made["sanity_set"] = {"questions": 10, "kept": 5}
    (folder / "recipes-cpu.json").write_text(json.dumps({**made, "compared": compared, "others": others}))


def test_nothing_is_said_to_have_run_that_no_result_names(results):
    assert {recipes_page.label(name) for name in shipped_recipes()} == {"composed only"}
    assert "Not measured yet" in recipes_page.measured_table()
    record(results, others=[run("cpu_gspo", "fp16", steps=3)])
    (results / "recipes-gpu.json").write_text(json.dumps({"runs": [{"recipe": "gsm8k_grpo", "gpu": "one H200"}]}))
    assert recipes_page.label("cpu_gspo") == "run end to end on a CPU, 3 steps"
    assert recipes_page.label("gsm8k_grpo") == "run end to end on one H200"
    assert recipes_page.label("cpu_grpo") == "composed only"


@pytest.mark.parametrize(
    ("bf16", "fp16", "verdict"),
    ((0.9, 0.91, "no difference"), (0.8, 0.9, "FP16 is ahead"), (0.9, 0.8, "BF16 is ahead")),
)
def test_the_table_says_who_is_ahead_beyond_two_standard_errors(results, bf16, fp16, verdict):
    record(results, compared=[run("cpu_grpo", "bf16", bf16, gap=8e-4), run("cpu_grpo", "fp16", fp16)])
    text = recipes_page.measured_table()
    assert verdict in text and "8.0 times smaller" in text
    others = {"no difference", "FP16 is ahead", "BF16 is ahead"} - {verdict}
    assert not any(other in text for other in others)


def test_every_recipe_is_in_one_table_and_has_hardware():
    tables = (recipes_page.paper_table(), recipes_page.everyday_table(), recipes_page.cpu_table())
    named = [line.split("`")[1] for table in tables for line in table.splitlines() if line.startswith("| `")]
    assert sorted(named) == sorted(shipped_recipes())
    assert all(recipe.hardware for recipe in shipped_recipes().values())


def test_a_run_is_reduced_to_its_end_and_its_gap():
    rewards = [0.1] * 10 + [0.5, 0.7] * 5
    metrics = [StepMetrics(0, {"val-core/x": 1.0})]
    for step, reward in enumerate(rewards, 1):
        # One of the policy gradient's: its gap is measured in the first mini-batch.
        gap = {"mismatch_first_update/log_prob_abs_diff_mean": 2e-4, "actor/skipped_steps": float(step == 3)}
        metrics.append(StepMetrics(step, {"critic/score/mean": reward, **gap}))
    found = recipes_cpu.summarise(metrics)
    assert found["steps"] == 20 and found["skipped_steps"] == 1
    assert found["accuracy_first"] == pytest.approx(0.1)
    assert found["accuracy_last"] == pytest.approx(0.6)
    assert found["accuracy_last_standard_error"] == pytest.approx(0.1 * (10 / 9) ** 0.5 / 10**0.5)
    assert found["gap_mean"] == pytest.approx(2e-4)
