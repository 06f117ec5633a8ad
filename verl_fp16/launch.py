"""How a recipe is started: the command and the environment of verl's own launcher, on every supported verl."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from verl_fp16.groups import misused_group
from verl_fp16.hydra_options import exclusive_options
from verl_fp16.installed import EXTERNAL_MODULES, InstalledVerl
from verl_fp16.recipe_files import Recipe, require_trainer

MODULES_VAR = "VERL_USE_EXTERNAL_MODULES"
_MODULES_KEY = f"ray_kwargs.ray_init.runtime_env.env_vars.{MODULES_VAR}"
_RECIPE_FLAGS = ("--config-name", "-cn", "--config-path", "-cp")


class LaunchError(ValueError):
    """Arguments that contradict the recipe; the message names them and what to do."""


@dataclass(frozen=True)
class Launch:
    """A process to start.

    Args:
        command: program and arguments.
        environment: what is set on top of the environment of this process.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def as_shell(self) -> str:
        """The same as one line for a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])


def plan_launch(recipe: Recipe, arguments: Sequence[str], verl: InstalledVerl, environ: Mapping[str, str]) -> Launch:
    """The launch of a recipe with Hydra's arguments, which are passed on as they are.

    Raises:
        LaunchError: an argument would make Hydra read another configuration than the recipe, or misuses a group.
        RecipeError: the recipe does not build on verl's configuration.
    """
    _refuse_other_config(recipe, arguments)
    require_trainer(recipe)
    if misused := misused_group(tuple(recipe.groups), arguments):
        raise LaunchError(misused)
    if clash := exclusive_options(arguments):
        raise LaunchError(f"{' and '.join(clash)} exclude each other: a start has one of them. Leave the others out")
    environment = launch_environment(verl, environ)
    overrides = list(arguments)
    if MODULES_VAR in environment:
        overrides = _hand_modules_to_workers(environment[MODULES_VAR], overrides)
    command = (sys.executable, "-m", "verl.trainer.main_ppo", *_config_arguments(recipe, verl), *overrides)
    return Launch(command, environment)


def launch_environment(verl: InstalledVerl, environ: Mapping[str, str]) -> dict[str, str]:
    """What has to be set so that ``import verl`` loads the plugins; empty where verl reads their entry points."""
    if verl.reads_entry_points:
        return {}
    return {MODULES_VAR: _with_ours(environ.get(MODULES_VAR, ""))}


def _with_ours(modules: str) -> str:
    theirs = [name.strip() for name in modules.split(",") if name.strip()]
    return ",".join([*theirs, *(name for name in EXTERNAL_MODULES if name not in theirs)])


def _config_arguments(recipe: Recipe, verl: InstalledVerl) -> tuple[str, ...]:
    if recipe.shipped:
        return ("--config-name", recipe.name)
    # With --config-dir alone a copy that kept its name would lose, silently, to the shipped recipe: Hydra appends that
    # folder behind the package's. So the copy's folder goes first, and verl's own, where ppo_trainer is, last.
    folders = ("--config-path", str(recipe.path.parent), "--config-dir", str(verl.config_dir))
    return (*folders, "--config-name", recipe.name)


def _refuse_other_config(recipe: Recipe, arguments: Sequence[str]) -> None:
    for argument in arguments:
        flag = argument.partition("=")[0]
        # Hydra's parser takes what an option begins with for the option, and a short one with its value behind it.
        abbreviated = len(flag) > len("--config-") and any(full.startswith(flag) for full in _RECIPE_FLAGS)
        if flag in _RECIPE_FLAGS or abbreviated or argument.startswith(("-cn", "-cp")):
            raise LaunchError(f"{flag} contradicts the recipe {recipe.name}: name the configuration as RECIPE")
        if flag in ("--config-dir", "-cd") and not recipe.shipped:
            raise LaunchError(
                f"{flag} is taken by verl's own folder where RECIPE is a file: add yours with "
                "'hydra.searchpath=[file:///your/folder]'"
            )


def _hand_modules_to_workers(modules: str, overrides: Sequence[str]) -> list[str]:
    """Put the modules into Ray's runtime environment: workers of a running cluster do not inherit ours."""
    kept = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key.lstrip("+") == _MODULES_KEY:
            theirs = value.strip("'\"")
            modules = _with_ours(f"{theirs},{modules}")
        else:
            kept.append(override)
    unique = ",".join(dict.fromkeys(modules.split(",")))
    return [f"++{_MODULES_KEY}='{unique}'", *kept]
