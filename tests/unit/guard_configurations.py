"""What the flag makes of verl's configuration, small, with Hydra's overrides on it, judged by the guard."""

from __future__ import annotations

import copy

import yaml
from omegaconf import OmegaConf

from verl_fp16 import guard
from verl_fp16.guard.case import ROLES
from verl_fp16.guard.roles import payload
from verl_fp16.settings import Settings

ACTOR, REF, CRITIC = (role.engine for role in ROLES)
ROLLOUT = "actor_rollout_ref.rollout"
VLLM = f"{ROLLOUT}.engine_kwargs.vllm"
MODEL = "actor_rollout_ref.model"
CORRECTION = "algorithm.rollout_correction"
LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"


def configuration(train="float16", rollout="float16", settings=None):
    """What the flag makes of verl's configuration, as far as the guard looks at it."""
    settings = settings or Settings(train, rollout)

    def engine(role):
        mixed = {"param_dtype": train, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
        mixed["verl_fp16"] = payload(role, settings)
        return {"dtype": train, "model_dtype": "fp32", "forward_only": role == "ref", "mixed_precision": mixed} | {
            "use_no_sync_for_gradient_accumulation": False
        }

    config = {
        "verl_fp16": {"train_dtype": train, "rollout_dtype": rollout},
        "actor_rollout_ref": {
            "actor": {"_target_": "A", "strategy": "fsdp", "fsdp_config": engine("actor"), "optim": {}},
            "ref": {"strategy": "fsdp", "fsdp_config": engine("ref")},
            "rollout": {
                **{"name": "vllm", "dtype": rollout, "calculate_log_probs": True, "engine_kwargs": {"vllm": {}}},
                **{"n": 8, "prompt_length": 512, "response_length": 1024, "max_model_len": 1536},
            },
            "model": {"path": "nobody/knows"},
        },
        "critic": {"strategy": "fsdp", "fsdp": engine("critic")},
        "algorithm": {"adv_estimator": "grpo", "rollout_correction": {"bypass_mode": False, "rollout_is": "token"}},
        "trainer": {"use_v1": True},
    }
    return config, settings


def apply(config, overrides):
    """Hydra's overrides, on a resolved configuration."""
    config = OmegaConf.create(copy.deepcopy(config))
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if override.startswith("~"):
            parent, _, name = override[1:].rpartition(".")
            OmegaConf.select(config, parent).pop(name)
        else:
            is_payload = value.startswith("${verl_fp16:")
            value = payload(value[12:-1], Settings()) if is_payload else yaml.safe_load(value)
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        if key == f"{CORRECTION}.bypass_mode":  # the flag's resolver reads it
            OmegaConf.update(config, f"{ACTOR}.mixed_precision.verl_fp16.bypass_mode", value is True)
    return OmegaConf.to_container(config, resolve=True)


def check(overrides, *, train="float16", rollout="float16", verl="0.9.1", entry="", settings=None):
    config, settings = configuration(train, rollout, settings)
    return guard.check(apply(config, overrides), settings, verl=verl, entry=entry)
