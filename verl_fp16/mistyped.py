"""Flags with a slip. To Hydra they are new keys of nobody's, and the run would be in BF16 without a word."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

GROUP = "precision"

# Other names that people give the flag.
_SYNONYMS = ("dtype", "prec", "mixed_precision")


def mistyped_flag(config: Mapping[str, Any], members: Collection[str]) -> tuple[str, Any, str] | None:
    """A key that was meant to be the flag: (key, value, the flag's member), or None.

    That is a key at the top with a name like the group's and one of ``members`` as value, a member's name that is set
    to true, or the group's own name below the top. Any other key is the user's own.

    Args:
        config: the configuration as plain containers, unresolved.
        members: the names in the group.
    """
    for key, value in config.items():
        if value is True and key in members:
            return key, value, key
        if isinstance(value, str) and value in members and key != GROUP and _like_the_flag(key):
            return key, value, value
    for key, value in _below_the_top(config):
        if key.endswith(f".{GROUP}") and isinstance(value, str) and value in members:
            return key, value, value
    return None


def _like_the_flag(key: str) -> bool:
    return key in _SYNONYMS or bool(get_close_matches(key, [GROUP], cutoff=0.8))


def _below_the_top(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _below_the_top(value, f"{prefix}{key}.")
        elif prefix:
            yield f"{prefix}{key}", value
