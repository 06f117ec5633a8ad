"""Recipes as files: the shipped ones by name, a user's own by path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from verl_fp16.groups import GROUPS

_SCALES = {
    "gpus_1": "1 GPU",
    "gpus_4": "4 GPUs",
    "gpus_8": "8 GPUs",
    "gpus_8_large": "8 GPUs",
    "two_nodes": "2 x 8 GPUs",
    "two_nodes_large": "2 x 8 GPUs",
}


TRAINER = "ppo_trainer"
"""verl's own configuration, which every recipe builds on."""


class RecipeError(ValueError):
    """A recipe is unknown or cannot be used; the message names it and the way out."""


@dataclass(frozen=True)
class Recipe:
    """A complete configuration for verl's PPO trainer.

    Args:
        name: its name for Hydra, the file's name without ``.yaml``.
        path: the file.
        shipped: whether it is one of this package's, which Hydra finds by name alone.
    """

    name: str
    path: Path
    shipped: bool

    @property
    def summary(self) -> str:
        """The first line of the comment at the file's top, "" if there is none."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        first = next((line for line in lines if line.strip()), "")
        return first.lstrip("# ").strip() if first.startswith("#") else ""

    @property
    def groups(self) -> dict[str, str]:
        """Group -> member, of the defaults list; {} if there is none that can be read."""
        entries = (entry for entry in self.defaults or () if isinstance(entry, dict))
        return {str(group): str(member) for entry in entries for group, member in entry.items()}

    @property
    def defaults(self) -> tuple[Any, ...] | None:
        """The defaults list, () if it has none; None if the file is no YAML."""
        content = self.content
        if content is None:
            return None
        defaults = content.get("defaults")
        return tuple(defaults) if isinstance(defaults, list) else ()

    @property
    def content(self) -> dict[str, Any] | None:
        """What the file says, {} where that is no mapping; None if it is no YAML."""
        try:
            content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, OSError):
            return None
        return content if isinstance(content, dict) else {}

    @property
    def hardware(self) -> str:
        """What it is made for, by its groups ``scale`` and ``hardware``; "" if it has neither of ours."""
        groups = self.groups
        return "CPU" if groups.get("hardware") == "cpu" else _SCALES.get(groups.get("scale", ""), "")


def shipped_recipes() -> dict[str, Recipe]:
    """Name -> recipe, in alphabetical order."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: Recipe(path.stem, path, shipped=True) for path in sorted(folder.glob("*.yaml"))}


def is_path(text: str) -> bool:
    """Whether a recipe was given as a path rather than as a name."""
    return os.sep in text or text.endswith((".yaml", ".yml"))


def find_recipe(text: str) -> Recipe:
    """The recipe that ``text`` means: a path of a YAML file, or a shipped recipe's name.

    Raises:
        RecipeError: there is no such file or name; near names are in the message.
    """
    if is_path(text):
        return _own_recipe(text)
    shipped = shipped_recipes()
    if text in shipped:
        return shipped[text]
    near = get_close_matches(text, shipped, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"shipped recipes: {', '.join(shipped)}"
    if Path(f"{text}.yaml").is_file():
        hint = f"for the file in this folder write ./{text}.yaml. Of the shipped ones, {hint}"
    raise RecipeError(f"unknown recipe {text!r}: {hint}")


def _own_recipe(text: str) -> Recipe:
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        hint = f": the shipped recipe is called {path.stem}" if path.stem in shipped_recipes() else ""
        raise RecipeError(f"no such recipe file: {path}{hint}")
    if path.suffix != ".yaml":
        raise RecipeError(f"{path.name}: Hydra reads files that end in .yaml only; rename it")
    if path.stem in _verls_names() and path.parent != _verls_folder():
        raise RecipeError(f"{path}: {path.stem} is verl's own configuration, which the file would hide: rename it")
    return Recipe(path.stem, path, shipped=False)


def require_trainer(recipe: Recipe) -> None:
    """
    Raises:
        RecipeError: its defaults list certainly does not lead to verl's own configuration, which it is not itself
            either. A group of somebody else's, or a file that is not beside it, might.
    """
    if recipe.path.parent != _verls_folder() and not _may_lead_to_trainer(recipe.path, frozenset()):
        raise RecipeError(lacks_trainer(recipe))


def is_written_out(content: Mapping[str, Any]) -> bool:
    """Whether a file is a whole configuration itself, as Hydra leaves one beside each run."""
    return {"actor_rollout_ref", "algorithm", "data", "trainer"} <= content.keys()


def lacks_trainer(recipe: Recipe) -> str:
    """The message on a recipe that verl's own configuration is no part of."""
    return f"{recipe.path}: its defaults list lacks `- {TRAINER}`, verl's own configuration: put it first"


def _may_lead_to_trainer(path: Path, above: frozenset[Path]) -> bool:
    content = Recipe(path.stem, path, shipped=False).content
    if content is None or path in above:
        return True  # Hydra tells what is wrong with it
    if is_written_out(content):
        return True
    defaults = content.get("defaults")
    for entry in defaults if isinstance(defaults, list) else ():
        if isinstance(entry, dict):
            if any(str(group).removeprefix("override ").strip() not in GROUPS for group in entry):
                return True
        elif entry != "_self_":
            beside = path.parent / f"{entry}.yaml"
            if not beside.is_file() or _may_lead_to_trainer(beside, above | {path}):
                return True
    return False


def _verls_folder() -> Path | None:
    from verl_fp16.installed import VerlNotFound, find_verl

    try:
        return find_verl().config_dir.resolve()
    except VerlNotFound:
        return None


def _verls_names() -> set[str]:
    """The names of verl's own configurations, of which one is known also where there is no verl."""
    folder = _verls_folder()
    return {TRAINER, *(path.stem for path in folder.glob("*.yaml"))} if folder else {TRAINER}


def copy_recipe(name: str, destination: str, *, force: bool = False) -> Path:
    """Copy a shipped recipe to a file, or into a folder under its own name; returns the file.

    Raises:
        RecipeError: unknown name, a file that is there already (unless ``force``), a folder that cannot be made, or a
            name that Hydra cannot read or that is verl's.
    """
    recipe = _shipped_recipe(name)
    target = Path(destination).expanduser()
    if target.is_dir() or destination.endswith(os.sep):
        target = target / recipe.path.name
    if target.suffix != ".yaml":
        raise RecipeError(f"{target}: Hydra reads files that end in .yaml only; call it {target.name}.yaml")
    if target.stem in _verls_names():
        raise RecipeError(f"{target}: {target.stem} is verl's own configuration, which the copy would hide: rename it")
    if target.exists() and not force:
        raise RecipeError(f"{target} is there already: choose another name, or overwrite it with --force")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(recipe.path.read_bytes())
    except OSError as error:
        what = "write" if target.parent.is_dir() else "make the folder"
        place = target if target.parent.is_dir() else target.parent
        raise RecipeError(f"cannot {what} {place}: {error.strerror}; choose another place") from None
    return target


def _shipped_recipe(name: str) -> Recipe:
    stem = name.removesuffix(".yaml")
    if is_path(name) and not Path(name).exists() and stem in shipped_recipes():
        raise RecipeError(f"unknown recipe {name!r}: the shipped recipe is called {stem}")
    return find_recipe(name)
