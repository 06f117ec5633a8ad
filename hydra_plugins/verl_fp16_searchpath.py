"""Puts verl_fp16's configuration groups and recipes on the search path of every Hydra program.

Hydra imports this module in every program of the environment, so it imports nothing but Hydra and OmegaConf.
"""

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf


def _plugin_not_loaded(role: str) -> None:
    """Answers ``${verl_fp16:<role>}`` until the plugin registers the real answer."""
    loaded = "verl_fp16.plugin" in sys.modules
    from verl_fp16 import plugin  # if it cannot be imported, this says why, which verl kept to itself
    from verl_fp16.refusal import one_message

    with one_message(plugin.PluginNotActive):
        if not loaded:
            raise plugin.not_loaded()
        plugin.require_active()
        raise plugin.PluginNotActive("the verl_fp16 plugin is in place, but its resolver is not: imported too late")


def _cpu_room_not_loaded(_: str) -> None:
    """Answers ``${verl_fp16_cpu:...}`` of ``hardware=cpu`` until the CPU room's plugin registers the real answer."""
    from verl_fp16.cpu.choice import not_loaded
    from verl_fp16.refusal import one_message

    with one_message(RuntimeError):
        raise not_loaded()


for _name, _resolver in (("verl_fp16", _plugin_not_loaded), ("verl_fp16_cpu", _cpu_room_not_loaded)):
    if not OmegaConf.has_resolver(_name):
        OmegaConf.register_new_resolver(_name, _resolver)


class VerlFp16SearchPathPlugin(SearchPathPlugin):
    """Appends ``pkg://verl_fp16.conf`` and ``pkg://verl_fp16.recipes``: verl's own files go first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="verl_fp16", path="pkg://verl_fp16.conf")
        search_path.append(provider="verl_fp16", path="pkg://verl_fp16.recipes")
