"""What recipes are made of: the files that Hydra merges, the keys that each writes, and where verl reads such a key.

Imports neither torch nor verl.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from verl_fp16.config_difference import ABSENT, flatten

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
CONF = ROOT / "verl_fp16" / "conf"

NAMES = tuple(path.stem for path in sorted(RECIPES.glob("*.yaml")))
PRECISIONS = tuple(path.stem for path in sorted((CONF / "precision").glob("*.yaml")))
# Recipes that are offered at other sizes than their own.
SCALED = {
    f"{name} scale={scale}": (name, scale) for name in ("gsm8k_grpo", "gsm8k_ppo") for scale in ("gpus_4", "gpus_8")
}

# A name that so many modules read says nothing alone: what it is a part of has to be read beside it.
COMMON = 12


@contextlib.contextmanager
def yaml_parsed_once() -> Iterator[None]:
    """Within it each text is parsed once, where Hydra parses some forty for each recipe; every reader gets a copy."""
    original = yaml.load
    parsed = functools.cache(original)

    def load(stream: Any, Loader: type) -> Any:
        return copy.deepcopy(parsed(stream if isinstance(stream, str) else stream.read(), Loader))

    yaml.load = load
    try:
        yield
    finally:
        yaml.load = original


@dataclass(frozen=True)
class Written:
    """A key that a file of recipes/ writes in one recipe.

    Args:
        file: the file below recipes/, without ``.yaml``.
        before: the value as it was written until this file; ``ABSENT`` where nothing had the key.
        last: whether no later file of the recipe writes it again.
    """

    file: str
    key: str
    value: Any
    before: Any
    last: bool


def keys_in(text: Mapping[str, Any]) -> dict[str, Any]:
    """Key and value of every leaf that a file sets for verl."""
    return dict(flatten({key: value for key, value in text.items() if key not in ("defaults", "hydra")}))


def merged_files(recipe: str, overrides: Iterable[str] = ()) -> list[tuple[str, Path]]:
    """The files of recipes/ and of the flag's groups that Hydra merges for a recipe, in this order.

    Hydra has to be initialized.
    """
    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list(recipe, overrides=list(overrides), run_mode=RunMode.RUN).defaults
    found = [
        (default.config_path, root / f"{default.config_path}.yaml") for default in defaults for root in (RECIPES, CONF)
    ]
    return [(name, path) for name, path in found if path.is_file()]


def written_keys(files: Iterable[tuple[str, Path]], plain: Mapping[str, Any]) -> list[Written]:
    """What files of recipes/ write, in the order in which they are merged onto ``plain``.

    Args:
        plain: verl's own leaves, interpolations as they are written.
    """
    now, steps = dict(plain), []
    for name, path in files:
        for key, value in keys_in(OmegaConf.to_container(OmegaConf.load(path), resolve=False)).items():
            steps.append((name, path, key, value, now.get(key, ABSENT)))
            now[key] = value
    final = {key: step for step, (_, _, key, _, _) in enumerate(steps)}
    return [
        Written(name, key, value, before, final[key] == step)
        for step, (name, path, key, value, before) in enumerate(steps)
        if path.is_relative_to(RECIPES)
    ]


class Reads:
    """The names that the modules of a release read: attributes, subscripts and arguments such as ``.get("name")``.

    Modules of the configuration itself, where a field is declared and checked, do not count.

    Args:
        root: the folder in which the package ``verl`` lies.
        references: the configuration's leaves as written; a key that another one refers to is read where that one is.
    """

    def __init__(self, root: Path, references: Iterable[Mapping[str, Any]] = ()):
        paths = [path for path in (root / "verl").rglob("*.py") if "config" not in path.relative_to(root).parts]
        self.modules = [names_read(path.read_text(encoding="utf-8")) for path in paths]
        self._referring: dict[str, set[str]] = {}
        for leaves in references:
            for key, value in leaves.items():
                for referred in interpolated(str(value)):
                    self._referring.setdefault(referred, set()).add(key)

    def reads(self, key: str) -> bool:
        """Whether some module reads ``key``, or a key that takes its value from it."""
        *_, parent, leaf = ("", *key.split("."))
        modules = [names for names in self.modules if leaf in names]
        if len(modules) > COMMON:
            modules = [names for names in modules if parent in names]
        return bool(modules) or any(self.reads(other) for other in self._referring.get(key, ()))


def names_read(source: str) -> frozenset[str]:
    """The names that a module reads from objects."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        elif isinstance(node, ast.Call):
            names.update(_texts(node.args))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            names.update(_texts([node.slice]))
    return frozenset(names)


def _texts(nodes: Iterable[ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def interpolated(value: str) -> list[str]:
    """The keys that a value as written refers to: ``${key}`` and ``${oc.select:key,default}``."""
    parts = [part.partition("}")[0] for part in value.split("${")[1:]]
    return [part.removeprefix("oc.select:").partition(",")[0] for part in parts]
