"""Misspelt keys are found against every supported verl, and nothing else is taken for one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from recipe_readers import NAMES, PRECISIONS, SCALED, yaml_parsed_once
from releases import RELEASES, release_folder

from verl_fp16.unknown_keys import unknown_keys

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"

SLIPS = {
    "trainer.total_epoch": "trainer.total_epochs",
    "trainer.n_gpu_per_node": "trainer.n_gpus_per_node",
    "data.train_batchsize": "data.train_batch_size",
    "trainr.total_epochs": "trainer",
    "actor_rollout_ref.modle.path": "actor_rollout_ref.model",
    f"{ACTOR}.optim.lrr": f"{ACTOR}.optim.lr",
    f"{ACTOR}.lr": f"{ACTOR}.optim.lr or critic.optim.lr",
    f"{ROLLOUT}.gpu_memory_utilisation": f"{ROLLOUT}.gpu_memory_utilization",
    f"{ROLLOUT}.tensor_parallel_size": f"{ROLLOUT}.tensor_model_parallel_size",
    "algorithm.adv_estimater": "algorithm.adv_estimator",
}
# verl hands on, reads from a node that does not list it, or has as a field of a dataclass; and the user's own.
NO_SLIPS = (
    "ray_kwargs.ray_init.address",
    "ray_kwargs.ray_init.runtime_env.env_vars.NAME",
    "actor_rollout_ref.model.override_config.attn_implementation",
    f"{ROLLOUT}.engine_kwargs.vllm.max_logprobs",
    f"{ACTOR}.optim.override_optimizer_config.eps",
    f"{ACTOR}.fsdp_config.mixed_precision.param_dtype",
    f"{ACTOR}.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap",
    f"{ACTOR}.policy_loss.rollout_correction.rollout_is",
    "data.video_key",
    "data_dir",
    "data_folders.train",
    "my.own.total_epoch",
)


def folder(release: str) -> Path:
    return release_folder(release) / "verl"


def composed(name: str, *overrides: str) -> dict[str, Any]:
    return OmegaConf.to_container(compose(name, overrides=list(overrides)), resolve=False)


@pytest.fixture(scope="module", params=RELEASES)
def release(request):
    with yaml_parsed_once(), initialize_config_dir(str(folder(request.param) / "trainer/config"), version_base=None):
        yield request.param


@functools.cache
def plain(release: str) -> dict[str, Any]:
    """verl's own configuration, composed within the fixture of its release."""
    return composed("ppo_trainer")


def found(release: str, ours: dict[str, Any]) -> dict[str, str]:
    return {f.key: f.advice for f in unknown_keys(ours, plain(release), folder(release))}


def with_keys(release: str, *keys: str) -> dict[str, Any]:
    config = OmegaConf.create(plain(release))
    for key in keys:
        OmegaConf.update(config, key, 3, force_add=True)
    return OmegaConf.to_container(config)


@pytest.mark.parametrize(("key", "meant"), SLIPS.items())
def test_a_misspelt_key_is_named_with_the_one_that_was_meant(release, key, meant):
    (told,) = found(release, with_keys(release, key)).items()
    assert key.startswith(told[0])
    assert f"did you mean {meant}?" in told[1]


def test_what_is_no_slip_is_not_taken_for_one(release):
    assert found(release, with_keys(release, *NO_SLIPS)) == {}


def test_a_key_without_a_near_one_is_told_too(release):
    told = found(release, with_keys(release, "trainer.zzz"))
    assert told == {"trainer.zzz": "leave it out, unless your code reads it"}


def test_a_dataclass_of_ones_own_may_have_any_field(release):
    ours = with_keys(release, f"{ACTOR}.temper")
    assert found(release, ours) != {}
    ours["actor_rollout_ref"]["actor"]["_target_"] = "mine.ActorConfig"
    assert found(release, ours) == {}


@pytest.mark.parametrize("name", NAMES)
def test_no_shipped_recipe_is_warned_of(release, name):
    precisions = PRECISIONS if name == "gsm8k_ppo" else ("fp16",)
    for precision in precisions:
        assert found(release, composed(name, f"precision={precision}")) == {}
    for recipe, scale in SCALED.values():
        if recipe == name:
            assert found(release, composed(name, f"scale={scale}")) == {}


def test_verls_other_engines_are_not_warned_of(release):
    if release == "0.8.0":
        others = ["megatron"]
    else:
        others = ["megatron", "veomni", "torchtitan"]
    for engine in others:
        assert found(release, composed("ppo_trainer", f"model_engine={engine}")) == {}
