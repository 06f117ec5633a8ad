"""Composes recipes on the verl of this process, as verl's launcher does, and writes what came out as JSON.

Run by test_recipes.py once for each release: ``python recipe_compositions.py REQUESTS ANSWER``, two JSON files. A
request is a name, a recipe and Hydra overrides.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from recipe_readers import yaml_parsed_once

from verl_fp16.config_difference import flatten


def main(requests: Path, answer: Path) -> None:
    import verl

    from verl_fp16 import plugin

    plugin.require_active()
    gc.freeze()  # verl's half million objects are not gone through again at every one of Hydra's allocations
    asked = json.loads(requests.read_text())
    with yaml_parsed_once(), initialize_config_module("verl.trainer.config", version_base=None):
        plain = values_of(compose("ppo_trainer"))
        composed = {name: outcome(plain, *request, asked["critic"]) for name, *request in asked["compose"]}
    answer.write_text(json.dumps({"verl": verl.__file__, "plain": plain, "composed": composed}))


def outcome(plain: dict[str, Any], recipe: str, overrides: list[str], validated: bool, critic: str) -> dict[str, Any]:
    """What one request gives: the leaves that differ from verl's own, what the guard finds, what verl's check says."""
    from verl_fp16.hooks.driver import examine

    try:
        config = compose(recipe, overrides=overrides)
    except HydraException as error:
        return {"error": str(error)}
    values = values_of(config)
    return {
        "changed": {key: value for key, value in values.items() if key not in plain or plain[key] != value},
        "findings": [f"{found.severity}: {found.key}" for found in examine(config)],
        "refusal": refusal_by_verl(config, critic) if validated else None,
    }


def values_of(config: DictConfig) -> dict[str, Any]:
    """Every leaf, interpolations resolved."""
    return dict(flatten(OmegaConf.to_container(config, resolve=True)))


def refusal_by_verl(config: DictConfig, critic: str) -> str | None:
    """What verl says against a configuration before it starts anything.

    Args:
        critic: a folder with a model, which verl's check opens where there is a critic.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    config.critic.model.path = critic
    try:
        with contextlib.redirect_stdout(sys.stderr):
            validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    except (AssertionError, ValueError, HydraException) as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
