"""Recipes composed and resolved as verl's launcher does, and a step of either trainer with them."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict
from paper_losses import Answers
from recipe_batch import ANSWERS, QUESTIONS, make_answers
from recipe_trainers import train_step
from recipe_workers import TableEngine, make_workers

TRAINERS = ("v1", "legacy")

# The batch is one mini-batch of a few micro-batches, by rows or by tokens as the recipe has it; nothing is logged or
# written. No algorithm is in these keys.
SMALL = {
    "data.train_batch_size": QUESTIONS,
    "actor_rollout_ref.rollout.n": ANSWERS,
    "actor_rollout_ref.actor.ppo_mini_batch_size": QUESTIONS,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 48,
    "critic.ppo_max_token_len_per_gpu": 48,
    "trainer.logger": [],
    "trainer.val_before_train": False,
    "trainer.test_freq": -1,
    "trainer.save_freq": -1,
}
SMALL_BY_ROWS = ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", "critic.ppo_micro_batch_size_per_gpu")


@functools.cache
def composed(name: str) -> DictConfig:
    """A shipped recipe by verl's configuration; not to be changed."""
    # The launcher of several runs is no part of any of them.
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(name, overrides=["hydra/launcher=basic"])


def overridden(name: str, trainer: str, changes: dict[str, Any] | None = None) -> DictConfig:
    """The recipe for a trainer with overrides; the value ``DELETED`` takes a key away."""
    config = copy.deepcopy(composed(name))
    config.trainer.use_v1 = trainer == "v1"
    for key, value in (changes or {}).items():
        if value is DELETED:
            parent, _, last = key.rpartition(".")
            node = OmegaConf.select(config, parent)
            with open_dict(node):
                del node[last]
        else:
            OmegaConf.update(config, key, value, force_add=True)
    return config


DELETED = object()


@dataclass(frozen=True)
class Step:
    """What a step left: the answers it was made of, verl's engines, and how often old log-probs were computed."""

    answers: Answers
    actor: TableEngine
    critic: TableEngine | None
    log_prob_passes: int
    optimizers: dict[str, Any]


def step_with(config: DictConfig, trainer: str, model: Path) -> Step:
    """A step on the small batch, by the workers that this configuration makes."""
    config = copy.deepcopy(config)
    for key, value in {**SMALL, "actor_rollout_ref.model.path": str(model)}.items():
        OmegaConf.update(config, key, value)
    for key in SMALL_BY_ROWS:
        if OmegaConf.select(config, key) is not None:
            OmegaConf.update(config, key, ANSWERS)
    OmegaConf.resolve(config)
    answers = make_answers()
    # Of verl's workers, that empties a GPU's caches and takes seconds.
    with mock.patch("verl.workers.engine_workers.aggressive_empty_cache"):
        workers = make_workers(config, answers)
    passes = train_step(trainer, config, workers, answers)
    there = {"actor": workers.actor, "critic": workers.critic}
    optimizers = {role: worker.config.optimizer_config for role, worker in there.items() if worker is not None}
    critic = workers.critic.engine if workers.critic is not None else None
    return Step(answers, workers.actor.engine, critic, passes, optimizers)


def agree(engine: TableEngine, loss: float, gradient: torch.Tensor) -> bool:
    """Whether an engine's only mini-batch had this loss and this gradient, to the rounding of float32.

    Token by token: an answer with a weight of e^12 must not hide what the others have.
    """
    (found,), (found_gradient,) = engine.losses, engine.gradients
    usual = float(gradient[gradient != 0].abs().median())
    same = torch.allclose(found_gradient.double(), gradient, rtol=1e-4, atol=1e-5 * usual)
    return same and abs(found - loss) <= 1e-5 * abs(loss)
