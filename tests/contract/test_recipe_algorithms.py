"""Every shipped recipe trains by its algorithm's formula, on both of verl's trainers.

The loss function that verl's worker dispatches, with the configuration that the worker receives, on a batch that the
trainer's own step has prepared, against the formula in float64: the loss and its gradient with respect to log pi. An
option that verl would ignore changes nothing of what comes out, and the comparison fails.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import paper_losses as paper
import pytest
import torch
from recipe_batch import make_answers
from recipe_runs import DELETED, TRAINERS, Step, agree, overridden, step_with
from recipe_workers import one_process_on_cpu

from verl_fp16 import plugin
from verl_fp16.hooks import driver
from verl_fp16.recipe_files import shipped_recipes
from verl_fp16.refusal import GuardError

# The algorithm of each recipe, and the L of its formula: the longest answer of its task.
RECIPES = {
    "cpu_dapo": ("dapo", 8),
    "cpu_grpo": ("grpo", 8),
    "cpu_grpo_seq_mis": ("grpo_seq_mis", 8),
    "cpu_grpo_token_tis": ("grpo_token_tis", 8),
    "cpu_gspo": ("gspo", 8),
    "cpu_lora": ("grpo_token_tis", 8),
    "cpu_moe": ("grpo_seq_mis", 8),
    "cpu_pg_seq_is": ("pg_seq_is", 8),
    "cpu_pg_seq_mis": ("pg_seq_mis", 8),
    "cpu_pg_seq_tis": ("pg_seq_tis", 8),
    "cpu_pg_token_is": ("pg_token_is", 8),
    "cpu_ppo": ("ppo", 8),
    "dapo_14b": ("dapo", 20480),
    "gsm8k_grpo": ("grpo", 1024),
    "gsm8k_ppo": ("ppo", 1024),
    "lora_grpo_token_tis": ("grpo_token_tis", 3000),
    "moe_grpo_seq_mis": ("grpo_seq_mis", 20480),
    "moe_grpo_token_tis": ("grpo_token_tis", 20480),
    "moe_pg_seq_tis": ("pg_seq_tis", 20480),
    "octothinker_grpo": ("grpo", 3000),
    "precision_ablation": ("grpo", 8192),
    "quickstart": ("grpo_plain", 8),
    "sanity_grpo": ("grpo", 8192),
    "sanity_grpo_seq_mis": ("grpo_seq_mis", 8192),
    "sanity_grpo_token_tis": ("grpo_token_tis", 8192),
    "sanity_gspo": ("gspo", 8192),
    "sanity_pg_seq_is": ("pg_seq_is", 8192),
    "sanity_pg_seq_mis": ("pg_seq_mis", 8192),
    "sanity_pg_seq_tis": ("pg_seq_tis", 8192),
    "sanity_pg_token_is": ("pg_token_is", 8192),
    "two_nodes": ("grpo", 8192),
}
DAPO = [name for name, (algorithm, _) in RECIPES.items() if algorithm == "dapo"]
# DAPO's groups are filtered by the v1 trainer alone.
RUNS = [
    (name, trainer) for name in RECIPES for trainer in TRAINERS if (name, trainer) not in {(n, "legacy") for n in DAPO}
]
RUNS_WITH_CRITIC = [run for run in RUNS if RECIPES[run[0]][0] == "ppo"]


@pytest.fixture(scope="module", autouse=True)
def verl_with_plugin():
    import verl  # noqa: F401

    plugin.require_active(verify=True)
    with one_process_on_cpu():
        yield


@pytest.fixture(scope="module")
def step(tiny_model: Path):
    @functools.cache
    def run(name: str, trainer: str) -> Step:
        config = overridden(name, trainer)
        driver.guard_start(config)
        driver.keep_tripwire(config)
        return step_with(config, trainer, tiny_model)

    return run


def expected(name: str, answers: paper.Answers) -> tuple[float, torch.Tensor]:
    algorithm, length = RECIPES[name]
    return paper.with_gradient(paper.LOSSES[algorithm], answers, length, answers.pi)


def test_no_recipe_is_left_out():
    assert set(RECIPES) == set(shipped_recipes())


@pytest.mark.parametrize(("name", "trainer"), RUNS)
def test_the_loss_is_the_paper_s(step, name, trainer):
    done = step(name, trainer)
    assert done.actor.micro_batches > 1, "sums of micro-batches are part of the claim"
    assert agree(done.actor, *expected(name, done.answers))
    # Bypass mode has no pass for old log-probs, and nothing else is without it.
    assert done.log_prob_passes == (0 if RECIPES[name][0].startswith("pg_") else 1)


@pytest.mark.parametrize(("name", "trainer"), RUNS_WITH_CRITIC)
def test_the_critic_s_loss_is_ppo_s(step, name, trainer):
    done = step(name, trainer)
    loss, gradient = paper.with_gradient(
        lambda answers, _: paper.value(answers), done.answers, 0, done.answers.predicted
    )
    assert done.critic.micro_batches > 1
    assert agree(done.critic, loss, gradient)


@pytest.mark.parametrize("name", DAPO)
def test_dapo_is_refused_where_groups_are_not_filtered(name):
    with pytest.raises(GuardError, match="filter_groups"):
        driver.guard_start(overridden(name, "legacy"))


# --- the batch can tell ----------------------------------------------------------------------------------------------

L = 8
VARIANTS = {
    "no clip": (paper.grpo, lambda a, n: grpo_unclipped(a, n)),
    "one clip": (paper.grpo, lambda a, n: grpo_with(a, n, high=0.2)),
    "no dual clip": (paper.grpo, lambda a, n: grpo_with(a, n, c=1e9)),
    "another dual clip": (paper.grpo, lambda a, n: grpo_with(a, n, c=10.0)),
    "dual clip of DAPO": (paper.dapo, lambda a, n: dapo_with(a, c=1e9)),
    "std": (paper.grpo, lambda a, n: grpo_with(a, n, by_std=True)),
    "std of GSPO": (paper.gspo, lambda a, n: paper.gspo(a, n, by_std=True)),
    "no std in DAPO": (paper.dapo, lambda a, n: dapo_with(a, by_std=False)),
    "length of the batch": (paper.grpo, lambda a, n: paper.grpo(a, 7)),
    "untruncated token weight": (paper.grpo_token_tis, lambda a, n: paper.grpo_token_tis(a, n, 1e9)),
    "the scripts' bound": (paper.grpo_token_tis, lambda a, n: paper.grpo_token_tis(a, n, 2.0)),
    "truncated, not masked": (paper.grpo_seq_mis, lambda a, n: paper.grpo(a, n, paper.truncated(seq_old(a), 3.0))),
    "masked on both sides": (paper.grpo_seq_mis, lambda a, n: paper.grpo(a, n, masked_on_both_sides(seq_old(a)))),
    "masked on the other side": (paper.grpo_seq_mis, lambda a, n: paper.grpo(a, n, seq_old(a) * (seq_old(a) <= 1 / 3))),
    "mask of a lower bound": (paper.grpo_seq_mis, lambda a, n: paper.grpo_seq_mis(a, n, 2.9)),
    "mask of a higher bound": (paper.grpo_seq_mis, lambda a, n: paper.grpo_seq_mis(a, n, 3.1)),
    "mask of a lower bound in PG": (paper.pg_seq_mis, lambda a, n: paper.pg_seq_mis(a, n, 2.9)),
    "mask of a higher bound in PG": (paper.pg_seq_mis, lambda a, n: paper.pg_seq_mis(a, n, 3.1)),
    "truncated far beyond": (paper.pg_seq_is, lambda a, n: paper.pg_seq_tis(a, n, 1e5)),
    "token truncated far beyond": (paper.pg_token_is, lambda a, n: paper.pg(a, n, token_new(a).clamp(max=1e4))),
    "no truncation": (paper.pg_seq_tis, paper.pg_seq_is),
    "no mask": (paper.pg_seq_mis, paper.pg_seq_is),
    "mask, not clamp": (paper.pg_seq_mis, paper.pg_seq_tis),
    "sequence, not token": (paper.pg_seq_is, paper.pg_token_is),
    "no weight": (paper.pg_token_is, lambda a, n: paper.pg(a, n, torch.ones_like(a.pi))),
    "advantages not whitened": (paper.ppo, lambda a, n: ppo_not_whitened(a)),
    "value not clipped": (lambda a, n: paper.value(a), lambda a, n: paper.value(a, clip=1e9)),
}  # fmt: skip


def seq_old(answers: paper.Answers) -> torch.Tensor:
    return paper.sequence_ratio(answers.pi_old, answers.mu, answers.mask)


def token_new(answers: paper.Answers) -> torch.Tensor:
    return paper.ratio(answers.pi, answers.mu)


def masked_on_both_sides(weight: torch.Tensor) -> torch.Tensor:
    return paper.masked(weight, 3.0) * (weight >= 1 / 3)


def grpo_unclipped(answers, length):
    loss = -paper.advantages(answers, by_std=False) * paper.ratio(answers.pi, answers.pi_old)
    return paper.over_constant(loss, answers.mask, length)


def ppo_not_whitened(answers):
    loss = paper.clipped(answers, paper.generalised_advantages(answers)[0], 0.2, 0.2, 3.0)
    return paper.over_tokens(loss, answers.mask)


def grpo_with(answers, length, *, high=0.28, c=3.0, by_std=False):
    loss = paper.clipped(answers, paper.advantages(answers, by_std=by_std), 0.2, high, c)
    return paper.over_constant(loss, answers.mask, length)


def dapo_with(answers, *, c=10.0, by_std=True):
    loss = paper.clipped(answers, paper.advantages(answers, by_std=by_std), 0.2, 0.28, c)
    return paper.over_tokens(loss, answers.mask)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_batch_tells_a_variant(variant):
    """Otherwise agreement would say nothing about what the variant leaves out."""
    answers = make_answers()
    right, wrong = (float(loss(answers, L).detach()) for loss in VARIANTS[variant])
    assert abs(right - wrong) > 1e-2 * abs(right)


@pytest.mark.parametrize("pair", itertools.combinations(paper.LOSSES, 2), ids=" and ".join)
def test_the_batch_tells_the_algorithms_apart(pair):
    answers = make_answers()
    one, other = (float(paper.LOSSES[name](answers, L).detach()) for name in pair)
    assert abs(one - other) > 1e-2 * abs(one)


# --- what is inert fails ---------------------------------------------------------------------------------------------

LOSS = "actor_rollout_ref.actor"
CORRECTION = "algorithm.rollout_correction"
PLANTED = {
    "loss of bypass mode left out": ("cpu_pg_seq_is", {f"{LOSS}.policy_loss.loss_mode": "vanilla"}),
    "correction not sent to the loss": ("cpu_pg_seq_mis", {f"{LOSS}.policy_loss.rollout_correction": DELETED}),
    "another loss in bypass mode": ("cpu_pg_token_is", {f"{CORRECTION}.loss_type": "ppo_clip"}),
    "weights by token": ("cpu_pg_seq_is", {f"{CORRECTION}.rollout_is": "token"}),
    "weights by sequence": ("cpu_grpo_token_tis", {f"{CORRECTION}.rollout_is": "sequence"}),
    "no weights": ("cpu_grpo_token_tis", {f"{CORRECTION}.rollout_is": None}),
    "another bound": ("cpu_pg_seq_tis", {f"{CORRECTION}.rollout_is_threshold": 2.0}),
    "no mask": ("cpu_grpo_seq_mis", {f"{CORRECTION}.rollout_rs": None}),
    "no mask in bypass mode": ("cpu_pg_seq_mis", {f"{CORRECTION}.rollout_rs": None}),
    "mask of the other side": ("cpu_grpo_seq_mis", {f"{CORRECTION}.rollout_rs_threshold": "3_1e300"}),
    "mask of the other side in bypass mode": ("cpu_pg_seq_mis", {f"{CORRECTION}.rollout_rs_threshold": "3_1e300"}),
    "mask of both sides": ("cpu_pg_seq_mis", {f"{CORRECTION}.rollout_rs_threshold": "3"}),
    "mask of a lower C": ("cpu_grpo_seq_mis", {f"{CORRECTION}.rollout_rs_threshold": "0.345_1e300"}),
    "mask of a lower C in bypass mode": ("cpu_pg_seq_mis", {f"{CORRECTION}.rollout_rs_threshold": "0.345_1e300"}),
    "mask of a higher C": ("cpu_grpo_seq_mis", {f"{CORRECTION}.rollout_rs_threshold": "0.32_1e300"}),
    "mask of a higher C in bypass mode": ("cpu_pg_seq_mis", {f"{CORRECTION}.rollout_rs_threshold": "0.32_1e300"}),
    "mask far on the other side": ("cpu_grpo_seq_mis", {f"{CORRECTION}.rollout_rs_threshold": f"{1 / 3}_1e3"}),
    "the same in bypass mode": ("cpu_pg_seq_mis", {f"{CORRECTION}.rollout_rs_threshold": f"{1 / 3}_1e3"}),
    "truncated far beyond": ("cpu_pg_seq_is", {f"{CORRECTION}.rollout_is_threshold": 1e5}),
    "token truncated far beyond": ("cpu_pg_token_is", {f"{CORRECTION}.rollout_is_threshold": 1e4}),
    "mask by token": ("cpu_grpo_seq_mis", {f"{CORRECTION}.rollout_rs": "token_k1"}),
    "no constant length": ("cpu_grpo", {f"{LOSS}.loss_scale_factor": None}),
    "no constant length in bypass mode": ("cpu_pg_token_is", {f"{LOSS}.loss_scale_factor": None}),
    "another mean": ("cpu_gspo", {f"{LOSS}.loss_agg_mode": "token-mean"}),
    "divided by std": ("cpu_grpo", {"algorithm.norm_adv_by_std_in_grpo": True}),
    "no higher clip": ("cpu_grpo", {f"{LOSS}.clip_ratio_high": 0.2}),
    "GSPO by token": ("cpu_gspo", {f"{LOSS}.policy_loss.loss_mode": "vanilla"}),
    "DAPO's dual clip left out": ("cpu_dapo", {f"{LOSS}.clip_ratio_c": 3.0}),
    "GRPO's advantages for PPO": ("cpu_ppo", {"algorithm.adv_estimator": "grpo"}),
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("plant", PLANTED)
def test_an_option_taken_away_fails(plant, trainer, tiny_model):
    """The legacy trainer sets the loss of bypass mode on its own side, when its workers have theirs already."""
    name, changes = PLANTED[plant]
    done = step_with(overridden(name, trainer, changes), trainer, tiny_model)
    assert not agree(done.actor, *expected(name, done.answers))


@pytest.mark.parametrize("plant", ("loss of bypass mode left out", "correction not sent to the loss"))
def test_what_the_v1_trainer_would_ignore_is_refused(plant):
    with pytest.raises(GuardError, match="rollout_correction"):
        driver.guard_start(overridden(PLANTED[plant][0], "v1", PLANTED[plant][1]))
