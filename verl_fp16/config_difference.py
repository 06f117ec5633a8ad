"""What a recipe or a flag changes in verl's configuration, composed by Hydra without importing verl."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_fp16 import composition_messages
from verl_fp16.composition_messages import NO_NAME, one_line
from verl_fp16.findings import Finding, render_errors
from verl_fp16.recipe_files import Recipe, is_written_out, lacks_trainer

PLAIN = "ppo_trainer"
_SEARCH_PATH = "hydra.searchpath="
_ROLE = re.compile(r"\$\{verl_fp16:\s*(\w+)\s*\}")


class CompositionError(ValueError):
    """The configuration cannot be composed; the message is Hydra's, on one line."""


class _Absent:
    """A key that one side does not have; null is a value."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


@dataclass(frozen=True)
class Change:
    """A key whose value differs; :data:`ABSENT` where a side does not have it."""

    key: str
    theirs: Any
    ours: Any


@dataclass(frozen=True)
class Composed:
    """A configuration, and what the guard says of it.

    Args:
        values: plain containers, interpolations resolved.
        findings: what a start with it would be refused for, or warned of; empty without the flag.
    """

    values: dict[str, Any]
    findings: tuple[Finding, ...]


def compose(config_dir: Path, overrides: Sequence[str], recipe: Recipe | None = None) -> Composed:
    """verl's PPO configuration with ``overrides``, or a recipe's, with interpolations resolved.

    A value that cannot be resolved here (``${oc.env:...}`` of a variable that is not set, ``${hydra:...}``) stays as it
    is written, and ``???`` stays ``???``.

    Args:
        config_dir: verl's own folder of ``ppo_trainer.yaml``.

    Raises:
        CompositionError: Hydra refuses an override or a defaults list.
        GuardError: settings under ``verl_fp16:`` are wrong or cannot be resolved, or the flag is mistyped.
    """
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from verl_fp16.hooks import driver
    from verl_fp16.refusal import GuardError
    from verl_fp16.settings import SettingsError

    try:
        first, arguments = place(config_dir, overrides, recipe)
        with initialize_config_dir(str(first), version_base=None):
            config = hydra_compose(recipe.name if recipe else PLAIN, overrides=arguments)
            if recipe is not None and not recipe.shipped:
                _require_trainer(config_dir, recipe, arguments)
    except yaml.YAMLError as error:
        raise CompositionError(one_line(str(error))) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not isinstance(error, HydraException | OmegaConfBaseException) and NO_NAME not in str(error):
            raise
        named = recipe.groups if recipe else {}
        plain = functools.partial(plain_configuration, config_dir)
        raise CompositionError(composition_messages.told(error, overrides, tuple(named), plain)) from None
    driver.refuse_mistyped_flag(config)
    if not driver.is_flag_given(config):
        return Composed(_resolved(config), ())
    try:
        _fill_in_role_settings(config)
        findings = tuple(driver.examine(config))
    except (SettingsError, OmegaConfBaseException):
        found = driver.examine(config)  # all that is wrong, as a start would be told it
        raise GuardError(render_errors(found, driver.declared_pair(config))) from None
    return Composed(_resolved(config), findings)


def _require_trainer(config_dir: Path, recipe: Recipe, overrides: list[str]) -> None:
    """
    Raises:
        CompositionError: none of verl's own configurations is in the defaults list, wherever the recipe's groups lead.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    loader = GlobalHydra.instance().config_loader()
    loaded = loader.compute_defaults_list(recipe.name, overrides, RunMode.RUN).defaults
    of_verl = {path.stem for path in config_dir.glob("*.yaml")}
    if not of_verl & {one.config_path for one in loaded} and not is_written_out(recipe.content or {}):
        raise CompositionError(lacks_trainer(recipe))


def plain_configuration(config_dir: Path) -> dict[str, Any]:
    """verl's own configuration, interpolations as written; also within a composition or a start of Hydra's."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    loader = ConfigLoaderImpl(create_config_search_path(str(config_dir)))
    config = OmegaConf.to_container(loader.load_configuration(PLAIN, [], RunMode.RUN), resolve=False)
    return {key: value for key, value in config.items() if key != "hydra"}


def place(config_dir: Path, overrides: Sequence[str], recipe: Recipe | None) -> tuple[Path, list[str]]:
    """The folder that Hydra looks in first, and the overrides with the others.

    Raises:
        yaml.YAMLError: the recipe is no YAML.
    """
    if recipe is None or recipe.shipped:
        return config_dir, list(overrides)
    return recipe.path.parent, _behind_own_folder(config_dir, overrides, recipe.path)


def _behind_own_folder(config_dir: Path, overrides: Sequence[str], recipe: Path) -> list[str]:
    """Put verl's folder last on the search path, behind what the command line or else the recipe put there."""
    from omegaconf import OmegaConf

    given = [o[len(_SEARCH_PATH) :].strip() for o in overrides if o.startswith(_SEARCH_PATH)]
    kept = [o for o in overrides if not o.startswith(_SEARCH_PATH)]
    if given:
        folders = [given[-1][1:-1]] if given[-1] not in ("[]", "null") else []
    else:
        written = OmegaConf.select(OmegaConf.load(recipe), "hydra.searchpath") or ()
        folders = [_quoted(folder) for folder in written]
    return [f"{_SEARCH_PATH}[{','.join([*folders, _quoted(config_dir.as_uri())])}]", *kept]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _fill_in_role_settings(config: Any) -> None:
    """Write out ``${verl_fp16:<role>}``, whose resolver answers only where the hooks are in place."""
    from omegaconf import OmegaConf

    from verl_fp16.hooks.driver import settings_for_role

    for key, value in flatten(OmegaConf.to_container(config, resolve=False)):
        match = _ROLE.fullmatch(value) if isinstance(value, str) else None
        if match:
            OmegaConf.update(config, key, settings_for_role(match[1], config), force_add=True)


def _resolved(node: Any) -> Any:
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(node, DictConfig | ListConfig):
        return node
    if node._is_none() or node._is_missing():
        return None if node._is_none() else "???"
    raw = OmegaConf.to_container(node, resolve=False)
    keys = list(node.keys()) if isinstance(node, DictConfig) else list(range(len(node)))
    values = {}
    for key in keys:
        try:
            values[key] = _resolved(node[key])
        except OmegaConfBaseException:
            values[key] = raw[key]
    return values if isinstance(node, DictConfig) else list(values.values())


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; lists and empty mappings are leaves."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Change]:
    """The leaves that differ, ours in their order, then those that only they have."""
    before, after = dict(flatten(theirs)), dict(flatten(ours))
    keys = [*after, *(key for key in before if key not in after)]
    pairs = ((key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys)
    return [Change(key, old, new) for key, old, new in pairs if type(old) is not type(new) or old != new]


def as_text(value: Any) -> str:
    """A value on one line, as YAML: the string '1' and the number 1 look different."""
    import yaml

    if value is ABSENT:
        return repr(value)
    return (
        yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
        .removesuffix("\n...\n")
        .rstrip("\n")
    )


def as_yaml(config: Mapping[str, Any]) -> str:
    """A whole configuration as YAML, keys in their order."""
    import yaml

    return yaml.safe_dump(dict(config), width=float("inf"), sort_keys=False, allow_unicode=True)


def unified(theirs: Mapping[str, Any], ours: Mapping[str, Any], label: str) -> str:
    """A unified diff of the two as YAML; "" where they are equal."""
    lines = difflib.unified_diff(
        as_yaml(theirs).splitlines(keepends=True), as_yaml(ours).splitlines(keepends=True), "verl", label
    )
    return "".join(lines)
