"""The recipes for a machine without a GPU in verl's trainers: what each declares, it trains with."""

from __future__ import annotations

import pytest
from test_trainer import check_nothing_left
from trainer import train

from verl_fp16.recipe_files import shipped_recipes

RECIPES = [name for name in shipped_recipes() if name.startswith("cpu_")]
IN_CI = ("cpu_pg_seq_mis",)
# What shows that the algorithm was in force: a metric that only its loss or its trainer logs.
SHOWN = {
    "cpu_grpo": "actor/pg_clipfrac",
    "cpu_grpo_token_tis": "rollout_corr/rollout_is_mean",
    "cpu_grpo_seq_mis": "rollout_corr/rollout_rs_seq_sum_k1_masked_fraction",
    "cpu_gspo": "actor/pg_clipfrac",
    "cpu_pg_seq_is": "rollout_corr/rollout_is_mean",
    "cpu_pg_seq_tis": "rollout_corr/rollout_is_mean",
    "cpu_pg_seq_mis": "rollout_corr/rollout_rs_seq_sum_k1_masked_fraction",
    "cpu_pg_token_is": "rollout_corr/rollout_is_mean",
    "cpu_dapo": "actor/pg_clipfrac_lower",
    "cpu_ppo": "critic/vf_loss",
    "cpu_lora": "rollout_corr/rollout_is_mean",
    "cpu_moe": "rollout_corr/rollout_rs_seq_sum_k1_masked_fraction",
}
# In bypass mode these are logged by the actor.
_ACTORS = "actor/"
LEGACY = ("trainer.use_v1=false",)


def _cases():
    for name in RECIPES:
        marks = () if name in IN_CI else (pytest.mark.slow,)
        yield pytest.param(name, (), marks=marks, id=f"{name}-v1")
        if name != "cpu_dapo":
            yield pytest.param(name, LEGACY, marks=(pytest.mark.slow,), id=f"{name}-legacy")


def test_every_recipe_has_its_metric():
    assert set(SHOWN) == set(RECIPES)


@pytest.mark.parametrize(("recipe", "trainer"), _cases())
def test_a_recipe_trains_in_float16_with_its_algorithm(recipe, trainer, sharp_model, sharp_moe_model, tmp_path):
    model = sharp_moe_model if recipe == "cpu_moe" else sharp_model
    more = ("critic.ppo_micro_batch_size_per_gpu=8",) if recipe == "cpu_ppo" else ()
    run = train(tmp_path, model, *trainer, *more, recipe=recipe)
    check_nothing_left(run)
    shown = SHOWN[recipe]
    step = run.step(2)
    assert shown in step or _ACTORS + shown in step, sorted(step)
    dtypes = {name.partition("/")[2]: value for name, value in step.items() if "_dtype/" in name}
    assert dtypes == {"train_dtype/float16": 1.0, "rollout_dtype/float16": 1.0}
    assert run.read_back["differences"] == []
