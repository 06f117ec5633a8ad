"""The wraps on one attribute, so that they can be put on and taken off in any order.

Wraps of several patchers may meet on one attribute. Each attribute has one chain, which knows the object that was there
before us and rebuilds the wrapped one from it whenever a wrap comes or goes. With the last wrap gone, the very object
that was there before is there again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from verl_fp16.patching.records import PatchError

MARK = "_verl_fp16_hook"
IN_SOURCE = "_verl_fp16_in_source"

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]

_chains: dict[tuple[int, str], Chain] = {}


def wrap(hook: str, wrapper: Wrapper, original: Callable[..., Any]) -> Callable[..., Any]:
    """``wrapper(original)``, with the original's name and attributes and the hook's mark."""
    replacement = functools.wraps(original)(wrapper(original))
    setattr(replacement, MARK, hook)
    return replacement


def is_wrapped_by(hook: str, function: Any, in_source: bool = False) -> bool:
    """Whether ``function``, or anything that it wraps, is the wrap of ``hook`` (by a source patch)."""
    while function is not None:
        # In the function's own attributes: functools.wraps hands the marks on to whatever wraps it.
        if getattr(function, MARK, None) == hook and (not in_source or getattr(function, IN_SOURCE, None) == hook):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


class Chain:
    """All wraps on the attribute ``name`` of ``owner`` (a module or a class), innermost first."""

    def __init__(self, owner: Any, name: str):
        self.owner = owner
        self.name = name
        self.raw = inspect.getattr_static(owner, name)
        self.installed: Any = self.raw
        self._own = name in vars(owner)
        self._wraps: dict[str, Wrapper] = {}

    @classmethod
    def of(cls, owner: Any, name: str) -> Chain:
        """The chain of an attribute; a new one where the attribute has been defined anew since."""
        chain = _chains.get((id(owner), name))
        if chain is None or chain._was_redefined():
            chain = cls(owner, name)
        return chain

    @property
    def function(self) -> Callable[..., Any]:
        """What was there before us, out of its staticmethod or classmethod."""
        return self.raw.__func__ if isinstance(self.raw, staticmethod | classmethod) else self.raw

    def add(self, hook: str, wrapper: Wrapper) -> None:
        """Put the wrap of ``hook`` outermost.

        Raises:
            PatchError: it is there already, or the attribute was changed by somebody else since our last wrap.
        """
        if hook in self._wraps:
            raise PatchError(f"{self._path()} is wrapped by it already")
        self._check_untouched("put on")
        self._rebuild({**self._wraps, hook: wrapper})

    def remove(self, hook: str) -> None:
        """Take the wrap of ``hook`` out, wherever in the chain it is.

        Raises:
            PatchError: the attribute was changed by somebody else since our last wrap.
        """
        if self._was_redefined():
            return
        self._check_untouched("taken off")
        self._rebuild({name: wrapper for name, wrapper in self._wraps.items() if name != hook})

    def holds(self, hook: str) -> bool:
        """Whether a call of the attribute still goes through the wrap of ``hook``."""
        return is_wrapped_by(hook, _function(inspect.getattr_static(self.owner, self.name, None)))

    def _rebuild(self, wraps: dict[str, Wrapper]) -> None:
        function = self.function
        for hook, wrapper in wraps.items():
            function = wrap(hook, wrapper, function)
        self._wraps = wraps
        if wraps:
            _chains[id(self.owner), self.name] = self
            kind = type(self.raw) if isinstance(self.raw, staticmethod | classmethod) else None
            self.installed = kind(function) if kind else function
            setattr(self.owner, self.name, self.installed)
            return
        self.installed = self.raw
        del _chains[id(self.owner), self.name]
        if self._own:
            setattr(self.owner, self.name, self.raw)
        else:
            delattr(self.owner, self.name)

    def _was_redefined(self) -> bool:
        """Whether the attribute is now something in which our wraps are not, such as after a reload of its module."""
        current = _function(inspect.getattr_static(self.owner, self.name, None))
        return bool(self._wraps) and not any(is_wrapped_by(hook, current) for hook in self._wraps)

    def _check_untouched(self, what: str) -> None:
        current = inspect.getattr_static(self.owner, self.name, None)
        if current is not self.installed:
            changed_by = getattr(_function(current), "__globals__", {}).get("__name__", "somebody")
            raise PatchError(
                f"{self._path()} was changed by {changed_by} after this package wrapped it; undo that change first: "
                f"until then our wrap cannot be {what}"
            )

    def _path(self) -> str:
        return f"{getattr(self.owner, '__module__', self.owner.__name__)}:{self.owner.__name__}.{self.name}"


def _function(attribute: Any) -> Any:
    return attribute.__func__ if isinstance(attribute, staticmethod | classmethod) else attribute
