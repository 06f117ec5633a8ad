"""Keys under verl's own nodes that no verl has: what Hydra takes for new ones, and nobody reads. Imports no verl."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from verl_fp16.findings import Finding

_TARGET = "_target_"
# What is handed on as it is, to Ray, an engine, a constructor; or whose keys are the user's own names.
_HANDED_ON = re.compile(r"override_.*|.*_(kwargs|options)|kw_args|ray_init|lora|turbo_config|backend|teacher_models")


@dataclass(frozen=True)
class _Unknown:
    """A key that a node of verl's does not have.

    Args:
        known: the node's keys in verl's configuration.
        target: the dataclass that is made of the node, "" without one.
        as_in_verl: whether verl's own configuration names the same dataclass.
    """

    key: str
    value: Any
    known: tuple[str, ...]
    target: str
    as_in_verl: bool


def unknown_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], verl: Path) -> list[Finding]:
    """A warning for each key that verl's own configuration lacks and verl does not read.

    Nodes that verl leaves empty or hands on take any key; so do nodes at the top, unless they are almost verl's. A key
    is known where the dataclass that its node names has it, where verl's sources read it by name, and where a shipped
    recipe sets it.

    Args:
        ours: the configuration as plain containers.
        theirs: verl's own, in the same form.
        verl: verl's folder.
    """
    return [_finding(unknown, theirs, verl) for unknown in _walk(ours, theirs) if not _is_known(unknown, verl)]


def _walk(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[_Unknown]:
    target = ours.get(_TARGET) or ""
    as_in_verl = target == (theirs.get(_TARGET) or "")
    for name, value in ours.items():
        name = str(name)
        if name not in theirs:
            if prefix or (isinstance(value, Mapping) and get_close_matches(name, theirs, 1, 0.8)):
                yield _Unknown(f"{prefix}{name}", value, tuple(theirs), str(target), as_in_verl)
        elif isinstance(value, Mapping) and isinstance(theirs[name], Mapping) and not _takes_any(name, theirs[name]):
            yield from _walk(value, theirs[name], f"{prefix}{name}.")


def _takes_any(name: str, node: Mapping[str, Any]) -> bool:
    return not node or (_TARGET not in node and _HANDED_ON.fullmatch(name) is not None)


def _is_known(unknown: _Unknown, verl: Path) -> bool:
    name = unknown.key.rpartition(".")[2]
    if unknown.target:
        fields = _fields(unknown.target, verl)
        # Of a dataclass that is not verl's nothing is known; with one of verl's, its fields are all there is.
        if fields is None or name in fields:
            return True
    elif unknown.key.partition(".")[2] and _is_read(name, verl):
        return True
    return not unknown.as_in_verl and not unknown.target or unknown.key in _keys_of_ours()


def _finding(unknown: _Unknown, theirs: Mapping[str, Any], verl: Path) -> Finding:
    meant = _meant(unknown, theirs, verl)
    question = f"did you mean {' or '.join(meant)}?" if meant else "leave it out"
    if unknown.target:
        made = unknown.target.rpartition(".")[2]
        why = f"verl makes its {made} of this node, which has no such field: it stops there, when Ray has been started"
        return Finding("warning", unknown.key, _short(unknown.value), why, advice=question)
    why = "verl's configuration has no such key, and nothing in verl reads one"
    advice = (
        f"{question} It may stay where code of your own reads it" if meant else f"{question}, unless your code reads it"
    )
    return Finding("warning", unknown.key, _short(unknown.value), why, advice=advice)


def _short(value: Any) -> Any:
    return "{...}" if isinstance(value, Mapping) else value


def _meant(unknown: _Unknown, theirs: Mapping[str, Any], verl: Path) -> list[str]:
    node, _, name = unknown.key.rpartition(".")
    for there in (unknown.known if unknown.as_in_verl else (), _fields(unknown.target, verl) or ()):
        if near := get_close_matches(name, [key for key in there if key != _TARGET], 1):
            return [f"{node}.{near[0]}".lstrip(".")]
    elsewhere = _elsewhere(theirs, name)
    return elsewhere if len(elsewhere) < 4 else []


def _elsewhere(node: Mapping[str, Any], name: str, prefix: str = "") -> list[str]:
    """Where else verl has a key of this name."""
    found = [f"{prefix}{name}"] if name in node else []
    for key, value in node.items():
        if isinstance(value, Mapping):
            found += _elsewhere(value, name, f"{prefix}{key}.")
    return found


@cache
def _keys_of_ours() -> frozenset[str]:
    """Every key that a shipped recipe or group sets, and the nodes above it."""
    import yaml

    from verl_fp16.config_difference import flatten

    keys: set[str] = set()
    package = Path(__file__).parent
    for path in (path for folder in ("recipes", "conf") for path in (package / folder).rglob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, _ in flatten(content if isinstance(content, dict) else {}):
            parts = key.split(".")
            keys |= {".".join(parts[: n + 1]) for n in range(len(parts))}
    return frozenset(keys)


def _is_read(name: str, verl: Path) -> bool:
    """Whether verl's sources read a key of this name from some configuration."""
    quoted = rf"[\"']{re.escape(name)}[\"']"
    reads = re.compile(
        rf"(config|cfg)[\w.]*(\.{re.escape(name)}\b|\[{quoted}\])|(\.get\(|\.pop\(|getattr\([\w.]+,)\s*{quoted}"
        rf"|{quoted} (not )?in\b|select\([\w.]+,\s*[\"'][\w.]*\b{re.escape(name)}[\"']"
    )
    return any(name in text and reads.search(text) for text in _sources(verl))


@cache
def _sources(verl: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8", errors="replace") for path in verl.rglob("*.py"))


@cache
def _fields(target: str, verl: Path) -> frozenset[str] | None:
    """The fields of the dataclass ``verl.module.Name`` and of its bases, by verl's sources; None if not there."""
    module, _, name = target.rpartition(".")
    first, *parts = module.split(".")
    place = verl.joinpath(*parts)
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    classes = {node.name: node for node in _classes(files)} if first == "verl" else {}
    return frozenset(_fields_of(name, classes)) if name in classes else None


def _classes(files: Iterable[Path]) -> Iterator[ast.ClassDef]:
    for file in files:
        if file.is_file():
            tree = ast.parse(file.read_text(encoding="utf-8"))
            yield from (node for node in tree.body if isinstance(node, ast.ClassDef))


def _fields_of(name: str, classes: Mapping[str, ast.ClassDef]) -> Collection[str]:
    if name not in classes:
        return set()
    found = {
        statement.target.id
        for statement in classes[name].body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    bases = (base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in classes[name].bases)
    return found.union(*(_fields_of(base, classes) for base in bases))
