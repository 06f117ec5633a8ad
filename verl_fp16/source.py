"""What a verl that was patched in its source calls: the same hooks, by call sites instead of at run time.

``patches/verl-<release>.diff`` puts these calls into verl's own files. The wrapper that a call applies is the one that
:data:`verl_fp16.hooks.HOOKS` declares, so both ways behave alike; the patcher finds the mark and leaves the target
alone ("not needed").
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from verl_fp16.patching import Hook, PatchError, import_object
from verl_fp16.patching.chain import IN_SOURCE, wrap


def verl_fp16_hook(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: call a function of verl through the wrapper of the hook ``name``.

    The wrapper is imported at the first call: this decorator runs inside ``import verl``, before there is a plugin.

    Raises:
        PatchError: the installed verl_fp16 has no such hook: the source patch is of another release of it.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        from verl_fp16.switch import disabled

        hook = _hook(name)
        if disabled():
            return function
        wrapped = wrap(name, functools.partial(_call_through, hook), function)
        setattr(wrapped, IN_SOURCE, name)
        return wrapped

    return decorate


def _call_through(hook: Hook, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    def wrapped() -> Callable[..., Any]:
        return import_object(hook.wrapper)(function)

    # verl and Ray ask of a method whether it is a coroutine function.
    if inspect.iscoroutinefunction(function):

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await wrapped()(*args, **kwargs)
    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapped()(*args, **kwargs)

    return call


def verl_fp16_module_hook(module: str, name: str) -> None:
    """At the end of the module ``module`` of verl: apply the hook ``name``, which is for a whole module.

    Raises:
        PatchError: as :func:`verl_fp16_hook`.
    """
    from verl_fp16.switch import disabled

    hook = _hook(name)
    if disabled():
        return
    imported = sys.modules[module]
    import_object(hook.wrapper)(imported)
    setattr(imported, IN_SOURCE, (*getattr(imported, IN_SOURCE, ()), name))


def _hook(name: str) -> Hook:
    from verl_fp16.hooks import HOOKS

    for hook in HOOKS:
        if hook.name == name:
            return hook
    raise PatchError(
        f"this verl was patched in its source with the hook {name!r}, which the installed verl_fp16 does not have. "
        "Reverse the patch with the release of verl_fp16 it came from and apply this one's: verl-fp16 patch-source PATH"
    )
