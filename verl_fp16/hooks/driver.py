"""Hooks on the process that reads the configuration, before Ray starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_fp16 import plugin
from verl_fp16.settings import Settings, SettingsError

NODE = "verl_fp16"


def check_before_start(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``auto_set_device`` is the first thing that each of verl's entry points does with its configuration."""

    def auto_set_device(config: Any) -> None:
        original(config)
        if is_flag_given(config):
            plugin.require_active()
            read_settings(config)

    return auto_set_device


def is_flag_given(config: Any) -> bool:
    """Whether one of the groups ``precision=...`` is in the configuration."""
    return isinstance(config, DictConfig) and config.get(NODE) is not None


def read_settings(config: DictConfig) -> Settings:
    """The validated node ``verl_fp16:``.

    Raises:
        SettingsError: an unknown key or an invalid value, by name.
    """
    node = OmegaConf.to_container(config[NODE], resolve=True, throw_on_missing=True)
    if not isinstance(node, dict):
        raise SettingsError(f"verl_fp16 must be a mapping, got {node!r}")
    return Settings.from_node(node)


def role_settings(role: str, *, _root_: DictConfig) -> DictConfig:
    """The answer to ``${verl_fp16:<role>}``: what rides to the workers of ``role`` in its ``mixed_precision``.

    Raises:
        PluginNotActive: the hooks are not in place in this process.
        SettingsError: as :func:`read_settings`.
    """
    plugin.require_active()
    plugin.flag_given = True
    settings = read_settings(_root_)
    scales = {"actor": settings.loss_scale, "critic": settings.critic_loss_scale, "ref": None}
    if role not in scales:
        raise SettingsError(f"${{verl_fp16:{role}}}: unknown role, known are {', '.join(scales)}")
    scale = scales[role]
    values = {"role": role, "dtype": settings.train_dtype, "loss_scale": vars(scale) if scale is not None else None}
    return OmegaConf.create(values)  # OmegaConf.resolve, which verl's task runner calls, takes no plain dict


def register_resolver() -> None:
    """Make ``${verl_fp16:<role>}`` resolve in this process."""
    OmegaConf.register_new_resolver(NODE, role_settings, replace=True)
