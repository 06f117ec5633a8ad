"""What is declared: a target, a hook on it, and the package that the hooks are for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from typing import Any


class PatchError(RuntimeError):
    """A hook cannot be put in place: the message names the hook, the target, what was found and what to do."""


@dataclass(frozen=True)
class Target:
    """One attribute of foreign code, or a whole module.

    Args:
        path: ``package.module:Class.attribute`` or ``package.module:function``; ``package.module`` for a module.
        parameters: parameter names that we rely on; the function must have them all.
        bodies: fingerprints of the bodies that we know (:mod:`verl_fp16.patching.fingerprint`), one for each variant
            among the supported releases. Empty where we rely on nothing inside.
    """

    path: str
    parameters: tuple[str, ...] = ()
    bodies: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        return self.path.partition(":")[0]

    @property
    def qualname(self) -> str:
        return self.path.partition(":")[2]


@dataclass(frozen=True)
class Hook:
    """A change of foreign code, declared as data.

    Args:
        name: unique name, shown in errors and in the table of hooks.
        target: what is wrapped. A hook whose ``wrapper`` is for a whole module has a target without ``:``; its wrapper
            gets the module, once, at the end of its import, and returns a function that undoes what it did.
        wrapper: ``module:function`` of ours, imported when the target is there. For an attribute it is
            ``wrapper(original) -> replacement``, may be called again for the same original, and keeps no state between
            calls; :func:`functools.wraps` is applied to the replacement.
        why: what goes wrong without it.
        how: the one thing that it changes.
        since: the first release of the package that it is for; "" for all. On earlier ones it is not needed.
        before: the first release that it is not for any more; "" for none.
        relies_on: further targets that are not changed, but whose bodies the wrapper's meaning rests on.
        upstream: pull request or issue where the same is discussed or done.
        until: when the hook can be removed.
    """

    name: str
    target: Target
    wrapper: str
    why: str
    how: str
    since: str = ""
    before: str = ""
    relies_on: tuple[Target, ...] = ()
    upstream: str = ""
    until: str = ""

    def is_for(self, version: str) -> bool:
        """Whether ``version`` is in the hook's range. A development version counts as the release it leads to."""
        from packaging.version import Version

        release = Version(Version(version).base_version)
        return not (self.since and release < Version(self.since)) and not (
            self.before and release >= Version(self.before)
        )


@dataclass(frozen=True)
class Package:
    """The package that hooks are for, and its releases that they were tested against.

    Args:
        name: name of the module and of the distribution.
        supported: releases, oldest first.
    """

    name: str
    supported: tuple[str, ...]

    def installed(self) -> str:
        """The version in this process; by the module's own word where it is imported, else by its distribution's.

        Raises:
            PatchError: it is not installed.
        """
        version = getattr(sys.modules.get(self.name), "__version__", None)
        if version is None:
            from importlib.metadata import PackageNotFoundError
            from importlib.metadata import version as version_of

            try:
                version = version_of(self.name)
            except PackageNotFoundError:
                raise PatchError(
                    f"{self.name} is not installed here; install {self.name}=={self.supported[-1]}"
                ) from None
        return version

    def is_there(self) -> bool:
        """Whether it can be imported."""
        return self.name in sys.modules or importlib.util.find_spec(self.name) is not None

    def knows(self, version: str) -> bool:
        """Whether ``version``, or the release that a development version leads to, is supported."""
        from packaging.version import InvalidVersion, Version

        try:
            return Version(version).base_version in self.supported
        except InvalidVersion:
            return False

    def refusal(self, version: str) -> str:
        """What to say where :meth:`knows` is False."""
        releases = ", ".join(self.supported)
        return (
            f"{self.name} {version} is not one of the releases these hooks were tested against ({releases}). Install "
            f"one of them (pip install {self.name}=={self.supported[-1]}) or a newer release of this package"
        )


def import_object(path: str) -> Any:
    """Return what ``module:qualname`` names, importing the module."""
    module, _, qualname = path.partition(":")
    return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
