"""The groups of configurations that this package puts on Hydra's search path, and their members. Imports no Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

_FOLDERS = {
    "precision": "conf",
    "hardware": "conf",
    "task": "recipes",
    "algo": "recipes",
    "base_model": "recipes",
    "scale": "recipes",
}
GROUPS = tuple(_FOLDERS)


@cache
def members(group: str) -> tuple[str, ...]:
    """The names in one of :data:`GROUPS`, in alphabetical order."""
    folder = Path(__file__).parent / _FOLDERS[group] / group
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def near_group(name: str) -> str | None:
    """The group that ``name`` was meant to be; None where it is like none."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(name.lower(), GROUPS, 1, 0.75)), None)


def misused_group(named: Sequence[str], overrides: Sequence[str]) -> str | None:
    """What is wrong with an override of a group, as Hydra's own words for it do not say; None where nothing is.

    Args:
        named: the groups that the recipe's own defaults list names.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        group = key.lstrip("+")
        if group not in GROUPS or not equals:
            continue
        if value in ("null", ""):
            return f"{override}: this names no member of the group; to drop the group write ~{group}"
        if key == f"+{group}" and group in named and f"~{group}" not in overrides:
            return f"{override}: this recipe names the group already: write {group}={value}, without +"
    return None
