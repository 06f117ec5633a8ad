"""What Hydra says of a configuration that it cannot compose, on one line and with the name that was meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from verl_fp16.groups import GROUPS, members, misused_group, near_group

NO_NAME = "Config group override must be a string"
"""Of the ValueError that Hydra raises for a group with a value that is no name."""

_MISSING = re.compile(r"Could not find '([\w/]+)/([^'/]+)'")
_OPTIONS = re.compile(r"Available options in '[^']*':\n((?:\t.*\n?)+)")
_TWICE = re.compile(r"Multiple values for ([\w/@.]+)\.|(\S+) appears more than once in the final defaults list")
_NO_OVERRIDE = re.compile(r"Could not override '([^']+)'")
_NO_DELETION = re.compile(r"Could not delete from config\. '([^']+)' does not exist")


def told(
    error: Exception, overrides: Sequence[str], named: Sequence[str], plain: Callable[[], Mapping[str, Any]]
) -> str:
    """One line for an exception of Hydra's or OmegaConf's.

    Args:
        overrides: as they were given.
        named: the groups that the recipe's own defaults list names.
        plain: gives verl's own configuration; asked only where a key's name may be a slip.
    """
    if misused := misused_group(named, overrides):
        return misused
    text = str(error).partition("\nConfig search path:")[0]
    if found := _TWICE.search(text):
        group = found[1] or found[2]
        value = next((o.partition("=")[2] for o in overrides if o.lstrip("+").startswith(f"{group}=")), "...")
        return f"{group} is named already: write {group}={value}, without +"
    if found := _MISSING.search(text):
        return _missing(text, *found.groups())
    if NO_NAME in text:
        return _no_name(overrides) or text
    if found := _NO_OVERRIDE.search(text):
        return _no_such_key(text, found[1], overrides, plain)
    if found := _NO_DELETION.search(text):
        meant = near_group(found[1]) or _near(found[1], plain)
        return f"~{found[1]}: there is no such key to delete{_question(meant, '~')}"
    return one_line(text)


def one_line(text: str) -> str:
    return " ".join(text.split())


def _missing(text: str, group: str, member: str) -> str:
    """Of a group's member that is not there, or of a group that is not."""
    where = text.partition(":")[0] + ": " if text.startswith("In '") else ""
    listed = _OPTIONS.search(text)
    if listed is None:
        near = near_group(group)
        hint = f"did you mean {near}: {member}?" if near else f"groups of this package are {', '.join(GROUPS)}"
        return f"{where}there is no group {group} with a member {member}: {hint}"
    options = listed[1].split()
    near = get_close_matches(member, options, 1)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    return f"{where}there is no {group}={member}: {hint}There are {', '.join(options)}"


def _no_name(overrides: Sequence[str]) -> str | None:
    """Of a group's override with a number or a truth value."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in GROUPS and value not in members(key):
            return f"{override}: {key} has no member {value}: there are {', '.join(members(key))}"
    return None


def _no_such_key(text: str, key: str, overrides: Sequence[str], plain: Callable[[], Mapping[str, Any]]) -> str:
    if "No match in the defaults list" in text or "." in key and near_group(key):
        return one_line(text)
    value = next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == key), "")
    near = near_group(key)
    if near is not None:
        return f"{key}={value}: there is no such key or group: did you mean {near}={value}?"
    meant = _question(_near(key, plain), "", f"={value}")
    return f"{key}={value}: verl's configuration has no such key{meant} A key of your own: +{key}={value}"


def _near(key: str, plain: Callable[[], Mapping[str, Any]]) -> str | None:
    """The key of verl's that is like ``key``: by its last part in the same node, else with its last part elsewhere."""
    from verl_fp16.config_difference import flatten

    keys = [name for name, _ in flatten(plain())]
    nodes = {name.rsplit(".", depth)[0] for name in keys for depth in range(name.count(".") + 1)}
    node, _, last = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in nodes if name.rpartition(".")[0] == node}
    if near := get_close_matches(last, beside, 1, 0.75):
        return beside[near[0]]
    same = [name for name in keys if name.rpartition(".")[2] == last]
    return next(iter(get_close_matches(key, same, 1, 0.75)), None)


def _question(near: str | None, before: str = "", behind: str = "") -> str:
    return f": did you mean {before}{near}{behind}?" if near else "."
