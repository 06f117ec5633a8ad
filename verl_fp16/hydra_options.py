"""Hydra's options among the arguments of a start, and the runs that these make. Imports Hydra where it is called."""

from __future__ import annotations

from argparse import ArgumentError, Namespace
from collections.abc import Sequence
from pathlib import Path

from verl_fp16.config_difference import place
from verl_fp16.recipe_files import Recipe

_EXCLUSIVE = ("run", "multirun", "cfg", "info", "shell_completion")


def options(arguments: Sequence[str]) -> Namespace | None:
    """As verl's launcher reads them, abbreviations and all; None where it refuses them."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        given, unknown = parser.parse_known_args(list(arguments))
    except ArgumentError:
        return None
    return None if unknown else given


def exclusive_options(arguments: Sequence[str]) -> list[str]:
    """Those of Hydra's options that exclude each other, where several of them are given; else none."""
    given = options(arguments) if any(argument.startswith("-") for argument in arguments) else None
    found = [f"--{name.replace('_', '-')}" for name in _EXCLUSIVE if given is not None and getattr(given, name)]
    return found if len(found) > 1 else []


def is_sweep(config_dir: Path, arguments: Sequence[str], recipe: Recipe) -> bool:
    """Whether verl's launcher would start several runs with ``arguments``: by an option, an override or the recipe.

    What Hydra cannot compose or read is no sweep here: the launcher tells what is wrong with it.
    """
    import yaml
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    given = options(arguments)
    if given is None or given.multirun:
        return given is not None
    try:
        first, overrides = place(config_dir, given.overrides, recipe)
    except yaml.YAMLError:
        return False
    with initialize_config_dir(str(first), version_base=None):
        mode = GlobalHydra.instance().hydra.get_mode(recipe.name, overrides)
    # None also where a folder of --config-dir, which is not looked in here, is needed.
    return mode == RunMode.MULTIRUN or (mode is None and "hydra.mode=MULTIRUN" in overrides)


def sweep_runs(config_dir: Path, overrides: Sequence[str], recipe: Recipe) -> list[list[str]]:
    """The overrides of each run of a sweep, in the order in which Hydra's basic sweeper starts them.

    Raises:
        HydraException: the sweep cannot be composed.
    """
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    first, placed = place(config_dir, overrides, recipe)
    with initialize_config_dir(str(first), version_base=None):
        loader = GlobalHydra.instance().hydra.config_loader
        hydra = loader.load_configuration(recipe.name, placed, run_mode=RunMode.MULTIRUN).hydra
        params = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
        written = OmegaConf.to_container(hydra.overrides.task, resolve=False)
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*params, *written])
    return BasicSweeper.split_arguments(parsed, None)[0]
