"""Puts a tuple of hooks into a process, wholly or not at all, and takes them out again."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from verl_fp16.patching.chain import IN_SOURCE, Chain, Wrapper, is_wrapped_by
from verl_fp16.patching.fingerprint import fingerprint_of
from verl_fp16.patching.importing import PostImportFinder, is_importing
from verl_fp16.patching.records import Hook, Package, PatchError, Target, import_object
from verl_fp16.patching.static import SourceTree, problems, unknown_body

# Patchers share the chains on an attribute.
_LOCK = threading.RLock()

CARRIED = "the source of this installation carries it"


@dataclass
class _State:
    hook: Hook
    status: str = "pending"  # pending | applied | not needed | refused | withdrawn
    detail: str = ""
    undo: Callable[[], None] | None = field(default=None, repr=False)
    chain: Chain | None = field(default=None, repr=False)


class Patcher:
    """Puts hooks into this process and takes them out again.

    A target whose module is not imported yet is wrapped at the end of that module's import, before any
    ``from module import name`` of it can run, so that such bindings see the wrapper. A hook is on its target at most
    once, whatever the order of import, :meth:`apply` and :meth:`undo`.

    All or nothing: when one hook does not fit, every other is taken out again and none is put in place any more.

    Args:
        hooks: the hooks, in the order in which they are put in place; undone in the reverse order.
        package: what the hooks are for; a release of it that is not supported refuses them all. None: any release.
    """

    def __init__(self, hooks: tuple[Hook, ...], package: Package | None = None):
        names = [hook.name for hook in hooks]
        if len(set(names)) != len(names):
            raise PatchError(f"hook names are not unique: {sorted(n for n in set(names) if names.count(n) > 1)}")
        self.hooks = hooks
        self.package = package
        self._states = [_State(hook) for hook in hooks]
        self._modules = {hook.target.module for hook in hooks}
        self._finder = PostImportFinder(self._modules, self.module_imported)
        self._strict = False
        self._chosen = False

    def apply(self) -> None:
        """Wrap what is imported already and arrange for the rest to be wrapped when it is.

        A failure is kept and raised by :meth:`require`; once :meth:`require` has passed, a later failure is raised at
        once, out of the import that met it.
        """
        with _LOCK:
            self._choose_for_release()
            if self._refused():
                return
            if any(state.status == "pending" for state in self._states):
                self._finder.install()
            # The import that is under way is beyond the finder's reach: require() comes back to it.
            loaded = [sys.modules.get(name) for name in sorted(self._modules)]
            self._put_in_place([m for m in loaded if m is not None and not is_importing(m)])

    def _choose_for_release(self) -> None:
        if self._chosen or self.package is None:
            return
        try:
            version = self.package.installed()
        except PatchError as error:
            if not self.package.is_there():
                self._refuse(self._states[0], str(error))
            return  # a checkout that is not imported yet: its version is known when it is
        self._chosen = True
        if not self.package.knows(version):
            self._refuse(self._states[0], f"{self._states[0].hook.target.path}: {self.package.refusal(version)}")
            return
        for state in self._states:
            if not state.hook.is_for(version):
                state.status, state.detail = "not needed", f"{self.package.name} {version} is outside its range"

    def module_imported(self, module: ModuleType) -> None:
        """Wrap the targets that live in ``module``, whose body has just run, for the first time or anew."""
        with _LOCK:
            self._choose_for_release()
            self._forget(module)
            self._put_in_place([module])
            if self._strict and (refused := self._refused()):
                raise PatchError(_message(refused))

    def _forget(self, module: ModuleType) -> None:
        """The body of ``module`` has run anew: what was put on the old objects does not count."""
        for state in self._states:
            if state.hook.target.module == module.__name__ and state.status == "applied":
                state.undo, state.chain, state.status = None, None, "pending"

    def _put_in_place(self, modules: list[ModuleType]) -> None:
        """Resolve all targets in ``modules``, and only then change the first."""
        if self._refused():
            return
        plans: list[tuple[_State, Callable[[], None]]] = []
        for state in self._states:
            for module in modules:
                if state.hook.target.module == module.__name__ and state.status == "pending":
                    try:
                        plans.append((state, self._plan(state, module)))
                    except Exception as error:  # noqa: BLE001  without the flag, none may come out of the import
                        self._refuse(state, _text(error))
                        return
        for state, put in plans:
            try:
                put()
            except Exception as error:  # noqa: BLE001  as above: a wrapper's own code runs here
                self._refuse(state, _text(error))
                return

    def _plan(self, state: _State, module: ModuleType) -> Callable[[], None]:
        """Check that the hook fits ``module`` and return what puts it in place.

        Raises:
            PatchError: it does not fit.
        """
        hook = state.hook
        for target in hook.relies_on:
            if target.module == module.__name__:
                function = _find(target, module)[2]
                # Whoever patched it in its source has answered for its body, as of a hook's own target.
                if not hasattr(function, IN_SOURCE):
                    _check(target, function)
        wrapper = import_object(hook.wrapper)
        if not hook.target.qualname:
            if hook.name in getattr(module, IN_SOURCE, ()):
                return functools.partial(_set, state, "not needed", CARRIED)
            return functools.partial(_put_on_module, state, wrapper, module)
        owner, name, function = _find(hook.target, module)
        if is_wrapped_by(hook.name, function, in_source=True):
            return functools.partial(_set, state, "not needed", CARRIED)
        _check(hook.target, Chain.of(owner, name).function)
        return functools.partial(_put_on_attribute, state, wrapper, owner, name)

    def _refuse(self, state: _State, reason: str) -> None:
        """Keep the reason and take everything out again: a process is patched wholly or not at all."""
        for other in reversed(self._states):
            if other.status in ("pending", "applied"):
                try:
                    _take_out(other)
                except PatchError as error:
                    reason = f"{reason}; besides, {error}"
                _set(other, "withdrawn", f"hook {state.hook.name!r} was refused")
        _set(state, "refused", reason)
        if not self._strict:  # else every further attempt at the import has to fail too
            self._finder.remove()

    def _refused(self) -> _State | None:
        return next((state for state in self._states if state.status == "refused"), None)

    def require(self) -> None:
        """Raise :class:`PatchError` if a hook could not be put in place, now or later in this process."""
        with _LOCK:
            self.apply()
            self._strict = True
            lost = [state for state in self._states if state.status == "applied" and not _is_in_place(state)]
            if refused := self._refused():
                raise PatchError(_message(refused))
            if lost:
                raise PatchError(f"hook {lost[0].hook.name!r}: {_lost(lost[0])}")

    def verify(self) -> None:
        """Check every hook for the installed release against the package's source files, importing nothing.

        So a target that is not imported yet, in this process or in this program, is known to fit or not.

        Raises:
            PatchError: naming every target that does not fit.
        """
        if self.package is None:
            raise PatchError("hooks that are for no package cannot be verified against its source")
        version = self.package.installed()
        if not self.package.knows(version):
            raise PatchError(_message(_State(self.hooks[0], "refused", self.package.refusal(version))))
        ours = [hook for hook in self.hooks if hook.target.module.partition(".")[0] == self.package.name]
        found = problems(ours, version, SourceTree.of_package(self.package.name))
        messages = [f"hook {name!r}: {message}" for name, listed in found.items() for message in listed]
        if messages:
            raise PatchError("; ".join(messages))

    def undo(self) -> None:
        """Restore every target to the object it was.

        Raises:
            PatchError: somebody else has wrapped a target after us; the wraps put on before that one stay.
        """
        with _LOCK:
            self._finder.remove()
            for state in reversed(self._states):
                _take_out(state)
            self._strict = self._chosen = False

    def status(self) -> dict[str, str]:
        """Hook name -> ``applied``, ``pending`` (its module is not imported), or one of these with a reason:
        ``not needed: ...``, ``refused: ...``, ``withdrawn: ...`` (another one was refused).

        What was applied and is no longer there, because somebody replaced it, is ``refused``.
        """
        return {state.hook.name: _describe(state) for state in self._states}


def _put_on_module(state: _State, wrapper: Callable[[ModuleType], Any], module: ModuleType) -> None:
    state.undo = wrapper(module)
    _set(state, "applied")


def _put_on_attribute(state: _State, wrapper: Wrapper, owner: Any, name: str) -> None:
    chain = Chain.of(owner, name)  # not before: another hook may have been put on the attribute since it was planned
    chain.add(state.hook.name, wrapper)
    state.undo, state.chain = functools.partial(chain.remove, state.hook.name), chain
    _set(state, "applied")


def _take_out(state: _State) -> None:
    if state.undo is not None:
        state.undo()
    state.undo, state.chain, state.status, state.detail = None, None, "pending", ""


def _set(state: _State, status: str, detail: str = "") -> None:
    state.status, state.detail = status, detail


def _find(target: Target, module: ModuleType) -> tuple[Any, str, Any]:
    """Owner, attribute name and function of a target; the function out of its staticmethod or classmethod."""
    *parents, name = target.qualname.split(".")
    owner: Any = module
    try:
        for parent in parents:
            owner = getattr(owner, parent)
        raw = inspect.getattr_static(owner, name)
    except AttributeError:
        raise PatchError(f"{target.path} does not exist in this release") from None
    return owner, name, raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw


def _check(target: Target, function: Callable[..., Any]) -> None:
    """Whether a live function is what the target says; nothing is asked of methods written in C."""
    if target.parameters:
        have = inspect.signature(function).parameters
        if missing := [name for name in target.parameters if name not in have]:
            raise PatchError(f"{target.path}{inspect.signature(function)} lacks the parameters {missing} it relies on")
    if target.bodies:
        try:
            found = fingerprint_of(function)
        except OSError as error:
            raise PatchError(
                f"{target.path}: its source cannot be read, so its body cannot be checked: {error}"
            ) from None
        if found not in target.bodies:
            raise PatchError(unknown_body(target, found))


def _is_in_place(state: _State) -> bool:
    return state.chain is None or state.chain.holds(state.hook.name)


def _lost(state: _State) -> str:
    return f"{state.hook.target.path} was replaced after it had been wrapped, so the wrap has no effect"


def _describe(state: _State) -> str:
    if state.status == "applied" and not _is_in_place(state):
        return f"refused: {_lost(state)}"
    return f"{state.status}: {state.detail}" if state.detail else state.status


def _message(state: _State) -> str:
    return f"hook {state.hook.name!r}: {state.detail}"


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, PatchError) else f"{type(error).__name__}: {error}"
