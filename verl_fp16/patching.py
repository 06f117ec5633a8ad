"""Monkey-patching as data: declare a hook, put it in place after import, take it out again.

This module knows no verl. A :class:`Hook` names what is wrapped and why; a :class:`Patcher` puts a tuple of hooks into
a process. A target whose module is not imported yet is wrapped at the end of that module's import, before any
``from module import name`` of it can run, so that such bindings see the wrapper.

An attribute is wrapped at most once by one hook, whatever the order of import, :meth:`Patcher.apply` and
:meth:`Patcher.undo`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

_MARK = "_verl_fp16_hook"


class PatchError(RuntimeError):
    """A hook cannot be put in place: the message names the hook, the target and what was found there."""


@dataclass(frozen=True)
class Target:
    """One attribute that a hook wraps.

    Args:
        path: ``package.module:Class.attribute`` or ``package.module:function``.
        parameters: parameter names that the wrapper relies on; the original must have them all.
    """

    path: str
    parameters: tuple[str, ...] = ()

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
            ``wrapper(original) -> replacement``; :func:`functools.wraps` is applied to the replacement.
        why: what goes wrong without it.
        how: the one thing that it changes.
        verl: the releases of verl it is for, as a version specifier.
        upstream: pull request or issue where the same is discussed or done.
        until: when the hook can be removed.
    """

    name: str
    target: Target
    wrapper: str
    why: str
    how: str
    verl: str = ">=0.9.1,<0.10"
    upstream: str = ""
    until: str = ""


@dataclass
class _State:
    hook: Hook
    status: str = "pending"  # pending | applied | failed
    error: str = ""
    undo: Callable[[], None] | None = field(default=None, repr=False)


def import_object(path: str) -> Any:
    """Return what ``module:qualname`` names, importing the module."""
    module, _, qualname = path.partition(":")
    return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))


def _owner_and_raw(module: ModuleType, target: Target, hook: str) -> tuple[Any, str, Any]:
    *parents, name = target.qualname.split(".")
    owner: Any = module
    try:
        for parent in parents:
            owner = getattr(owner, parent)
        raw = inspect.getattr_static(owner, name)
    except AttributeError:
        raise PatchError(f"hook {hook!r}: {target.path} does not exist in this release") from None
    return owner, name, raw


def _check_parameters(function: Callable[..., Any], target: Target, hook: str) -> None:
    if not target.parameters:
        return  # methods written in C have no signature to read
    have = inspect.signature(function).parameters
    missing = [name for name in target.parameters if name not in have]
    if missing:
        raise PatchError(
            f"hook {hook!r}: {target.path}{inspect.signature(function)} lacks the parameters {missing} it relies on"
        )


def _wrap_attribute(hook: Hook, module: ModuleType) -> Callable[[], None]:
    owner, name, raw = _owner_and_raw(module, hook.target, hook.name)
    function = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
    if getattr(function, _MARK, None) == hook.name:
        raise PatchError(f"hook {hook.name!r}: {hook.target.path} is wrapped by it already")
    _check_parameters(function, hook.target, hook.name)
    replacement = functools.wraps(function)(import_object(hook.wrapper)(function))
    setattr(replacement, _MARK, hook.name)
    own = name in vars(owner)
    setattr(owner, name, type(raw)(replacement) if isinstance(raw, staticmethod | classmethod) else replacement)

    def undo() -> None:
        if own:
            setattr(owner, name, raw)
        else:
            delattr(owner, name)

    return undo


class Patcher:
    """Puts hooks into this process and takes them out again.

    Args:
        hooks: the hooks, in the order in which they are put in place; undone in the reverse order.
    """

    def __init__(self, hooks: tuple[Hook, ...]):
        names = [hook.name for hook in hooks]
        if len(set(names)) != len(names):
            raise PatchError(f"hook names are not unique: {sorted(n for n in set(names) if names.count(n) > 1)}")
        self._states = [_State(hook) for hook in hooks]
        self._lock = threading.RLock()
        self._strict = False
        self._finder: _PostImportFinder | None = None

    def apply(self) -> None:
        """Wrap what is imported already and arrange for the rest to be wrapped when it is.

        A failure is kept and raised by :meth:`require`; once :meth:`require` has passed, a later failure is raised at
        once, out of the import that met it.
        """
        with self._lock:
            pending = {state.hook.target.module for state in self._states if state.status == "pending"}
            if pending and self._finder is None:
                self._finder = _PostImportFinder(self)
                sys.meta_path.insert(0, self._finder)
            for name in pending:
                module = sys.modules.get(name)
                # The import that is under way is beyond the finder's reach: require() comes back to it.
                if module is not None and not _is_importing(module):
                    self.module_imported(module)

    def module_imported(self, module: ModuleType) -> None:
        """Wrap the targets that live in ``module``, whose body has just run, for the first time or anew."""
        with self._lock:
            for state in self._states:
                if state.hook.target.module == module.__name__:
                    self._apply_one(state, module)

    def _apply_one(self, state: _State, module: ModuleType) -> None:
        try:
            if state.hook.target.qualname:
                state.undo = _wrap_attribute(state.hook, module)
            else:
                state.undo = import_object(state.hook.wrapper)(module)
        except Exception as error:  # noqa: BLE001  without the flag, no failure of ours may come out of verl's import
            state.status, state.error = "failed", f"{type(error).__name__}: {error}"
            if self._strict:
                raise PatchError(state.error) from error
        else:
            state.status, state.error = "applied", ""

    def wants(self, module: str) -> bool:
        """Whether a hook is for ``module``. Also one that was applied or failed: the module may be imported anew."""
        return any(state.hook.target.module == module for state in self._states)

    def require(self) -> None:
        """Raise :class:`PatchError` if a hook could not be put in place, now or later in this process."""
        self.apply()
        with self._lock:
            self._strict = True
            failed = [state.error for state in self._states if state.status == "failed"]
        if failed:
            raise PatchError("; ".join(failed))

    def undo(self) -> None:
        """Restore every target to the object it was."""
        with self._lock:
            if self._finder is not None:
                sys.meta_path.remove(self._finder)
                self._finder = None
            for state in reversed(self._states):
                if state.undo is not None:
                    state.undo()
                state.undo, state.status, state.error = None, "pending", ""
            self._strict = False

    def status(self) -> dict[str, str]:
        """Hook name -> ``applied``, ``pending`` (its module is not imported) or ``failed: reason``."""
        return {
            state.hook.name: f"failed: {state.error}" if state.status == "failed" else state.status
            for state in self._states
        }


def _is_importing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module that a hook waits for and tells the patcher when it has been executed."""

    def __init__(self, patcher: Patcher):
        self._patcher = patcher
        self._searching = threading.local()

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if getattr(self._searching, "active", False) or not self._patcher.wants(fullname):
            return None
        self._searching.active = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.active = False
        if spec is None or spec.loader is None:
            return None
        spec.loader = _NotifyingLoader(spec.loader, self._patcher)
        return spec


class _NotifyingLoader(importlib.abc.Loader):
    def __init__(self, loader: Any, patcher: Patcher):
        self._loader = loader
        self._patcher = patcher

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._patcher.module_imported(module)
