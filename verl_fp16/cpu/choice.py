"""Where the CPU room is chosen: ``trainer.device=cpu`` in the driver, ``VERL_PLATFORM=cpu`` in every other process.

``VERL_PLATFORM`` is verl's own variable. The driver puts it into the run's Ray environment, so that it also reaches the
workers of a cluster that was running before.
"""

from __future__ import annotations

import os
from typing import Any

from verl_fp16.switch import how_to_load

ENV_VAR = "VERL_PLATFORM"
PLATFORM = "cpu"

_VISIBLE, _NONE_VISIBLE = "CUDA_VISIBLE_DEVICES", ("", "NoDevFiles")

# Read by vLLM's CPU build. One GiB of KV cache and no core binding: the trainer's and the rollout's processes share the
# cores, and bound threads of two processes on one core wait for each other.
_VLLM_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def chosen_by_environment() -> bool:
    """Whether this process was told to run on the CPU."""
    return os.environ.get(ENV_VAR, "").strip().lower() == PLATFORM


def chosen_by_config(config: Any) -> bool:
    """Whether a resolved verl config asks for the CPU."""
    trainer = config.get("trainer") if hasattr(config, "get") else None
    return trainer is not None and trainer.get("device") == PLATFORM


def hand_on_to_workers(config: Any) -> None:
    """Make the processes of this run's Ray job choose the CPU too, through ``ray_kwargs.ray_init.runtime_env``."""
    from omegaconf import OmegaConf, open_dict

    env = {ENV_VAR: PLATFORM, **{name: os.environ.get(name, value) for name, value in _VLLM_ENV.items()}}
    os.environ.update(env)
    keep_gpus_hidden(OmegaConf.select(config, "ray_kwargs.ray_init.num_gpus"))
    with open_dict(config):
        for name, value in env.items():
            key = f"ray_kwargs.ray_init.runtime_env.env_vars.{name}"
            if OmegaConf.select(config, key) is None:
                OmegaConf.update(config, key, value, force_add=True)


def keep_gpus_hidden(slots: int | None) -> None:
    """Where ``CUDA_VISIBLE_DEVICES=`` hides all GPUs, name as many that do not exist as Ray gives out logical ones.

    Ray refuses to start with more than the variable names.
    """
    if slots and os.environ.get(_VISIBLE) in _NONE_VISIBLE:
        os.environ[_VISIBLE] = ",".join(["-1"] * int(slots))


def not_loaded() -> RuntimeError:
    """The error for ``hardware=cpu`` in a process into which verl has not loaded the CPU room's plugin."""
    return RuntimeError(
        "hardware=cpu is set, but verl did not load verl_fp16's plugin for it, and the run would look for a GPU. "
        + how_to_load("verl_fp16_cpu", "verl_fp16.cpu.plugin (with verl_fp16.plugin for the precision flag)")
    )
