"""Flags with a slip. To Hydra they are new keys of nobody's, and the run would be in BF16 without a word."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

GROUP = "precision"

# Other names that people give the flag, and other names of its members.
_SYNONYMS = ("dtype", "prec", "mixed_precision")
_DTYPES = {"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "fp32"}
# Where else it is looked for; a key of that name elsewhere is the user's own.
_NODES = ("trainer", "actor_rollout_ref", "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "critic")


def mistyped_flag(config: Mapping[str, Any], members: Collection[str]) -> tuple[str, Any, str] | None:
    """A key that was meant to be the flag: (key, value, the flag's member), or None.

    That is a key at the top with a name like the group's and one of ``members`` (or their dtype) as value, a member's
    name that is set to true, or the group's name in one of a few nodes. Any other key is the user's own.

    Args:
        config: the configuration as plain containers, unresolved, without the flag.
        members: the names in the group.
    """
    for key, value in config.items():
        if value is True and key.lower() in members:
            return key, value, key.lower()
        if (member := _member(value, members)) and _like_the_flag(key.lower()):
            return key, value, member
    return _in_a_node(config, members)


def mistyped_group(
    config: Mapping[str, Any], groups: Mapping[str, Collection[str]]
) -> tuple[str, Any, str, str] | None:
    """Beside the flag, a key that was meant to be it or another group: (key, value, group, member), or None.

    A key at the top with a name like a group's and one of its members as value. With the very name of another group
    than the flag's, or one of the flag's other names, it may be the user's own; so may one that is like another group
    than the flag's and that something in the configuration refers to.

    Args:
        config: the configuration as plain containers, unresolved.
        groups: group -> its members.
    """
    for key, value in config.items():
        for group, members in groups.items():
            like = get_close_matches(str(key).lower(), [group], cutoff=0.8) and (key != group or group == GROUP)
            member = _member(value, members) if like else None
            if member is not None and (group == GROUP or not _is_referred_to(str(key), config)):
                return key, value, group, member
    slip = _in_a_node(config, groups[GROUP])
    return (slip[0], slip[1], GROUP, slip[2]) if slip else None


def _is_referred_to(key: str, config: Mapping[str, Any]) -> bool:
    """By an interpolation, also by one within another."""
    return re.search(rf"\$\{{[^}}]*\b{re.escape(key)}\b", repr(config)) is not None


def _in_a_node(config: Mapping[str, Any], members: Collection[str]) -> tuple[str, Any, str] | None:
    """The flag's name in one of a few nodes of verl's."""
    for name in _NODES:
        node: Any = config
        for part in name.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        value = node.get(GROUP) if isinstance(node, Mapping) else None
        if member := _member(value, members):
            return f"{name}.{GROUP}", value, member
    return None


def _member(value: Any, members: Collection[str]) -> str | None:
    word = value.lower() if isinstance(value, str) else ""
    word = _DTYPES.get(word, word)
    return word if word in members else None


def _like_the_flag(key: str) -> bool:
    return key in _SYNONYMS or bool(get_close_matches(key, [GROUP], cutoff=0.8))
