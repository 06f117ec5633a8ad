"""Recipes as files: the shipped ones by name, a user's own by path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

_SCALES = {
    "gpus_1": "1 GPU",
    "gpus_4": "4 GPUs",
    "gpus_8": "8 GPUs",
    "gpus_8_large": "8 GPUs",
    "two_nodes": "2 x 8 GPUs",
    "two_nodes_large": "2 x 8 GPUs",
}


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
        try:
            content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            return {}
        defaults = content.get("defaults") if isinstance(content, dict) else None
        return {
            str(group): str(member)
            for entry in defaults or ()
            if isinstance(entry, dict)
            for group, member in entry.items()
        }

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
        hint += f" For the file in this folder write ./{text}.yaml"
    raise RecipeError(f"unknown recipe {text!r}: {hint}")


def _own_recipe(text: str) -> Recipe:
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise RecipeError(f"no such recipe file: {path}")
    if path.suffix != ".yaml":
        raise RecipeError(f"{path.name}: Hydra reads files that end in .yaml only; rename it")
    return Recipe(path.stem, path, shipped=False)


def copy_recipe(name: str, destination: str, *, force: bool = False) -> Path:
    """Copy a shipped recipe to a file, or into a folder under its own name; returns the file.

    Raises:
        RecipeError: unknown name, a file that is there already (unless ``force``), or a name that Hydra cannot read.
    """
    recipe = find_recipe(name)
    target = Path(destination).expanduser()
    if target.is_dir() or destination.endswith(os.sep):
        target = target / recipe.path.name
    if target.suffix != ".yaml":
        raise RecipeError(f"{target}: Hydra reads files that end in .yaml only; call it {target.name}.yaml")
    if target.exists() and not force:
        raise RecipeError(f"{target} is there already: choose another name, or overwrite it with --force")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(recipe.path.read_bytes())
    return target
