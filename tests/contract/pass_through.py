"""Whether a hook's wrapper, in a process without the flag, is as good as not there. Run by ``process_state``.

Each wrapper gets a fake in the place of the function that it wraps, and bare objects as arguments: a wrapper that
looked at, copied or changed any of them, or what the fake returns, could not but be seen.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from verl_fp16.cpu.plugin import DRIVER_HOOKS
from verl_fp16.hooks import HOOKS, VERL
from verl_fp16.patching import Hook, Target, import_object


class Planted(Exception):
    """Raised by the fake."""


def findings() -> dict[str, list[str]]:
    """Hook -> what is wrong with its wrapper; empty where nothing is. Hooks on whole modules are left out."""
    version = VERL.installed()
    hooks = [hook for hook in (*HOOKS, *DRIVER_HOOKS) if hook.is_for(version) and hook.target.qualname]
    return {hook.name: [*_problems(hook)] for hook in hooks}


def _problems(hook: Hook):
    true = inspect.unwrap(import_object(hook.target.path))
    makes_context = _makes_context_manager(import_object(hook.target.path))
    if not makes_context and (inspect.isgeneratorfunction(true) or inspect.isasyncgenfunction(true)):
        yield f"{hook.target.path} is a generator function, which this check does not know"
        return
    signature = inspect.signature(true)
    for way, (args, kwargs) in _ways_to_call(hook.target, signature).items():
        seen: list = []
        returned = object() if makes_context or _returns_something(true) else None
        before = _contents(args, kwargs)
        result = _call(hook, true, lambda *a, **k: (seen.append((a, k)), returned)[1], args, kwargs)  # noqa: B023
        if result is not returned:
            yield f"{way}: returned {result!r} instead of what the original returned"
        if len(seen) != 1:
            yield f"{way}: called the original {len(seen)} times"
        elif not _same(signature, (args, kwargs), seen[0]):
            yield f"{way}: called with {args} {kwargs}, the original got {seen[0]}"
        if _contents(args, kwargs) != before:
            yield f"{way}: changed an argument"
        planted = Planted()

        def fail(*args: Any, error: Planted = planted, **kwargs: Any) -> None:
            raise error

        try:
            _call(hook, true, fail, args, kwargs)
        except Planted as caught:
            if caught is not planted:
                yield f"{way}: raised another error than the original"
        else:
            yield f"{way}: swallowed the error that the original raised"


def _makes_context_manager(function: Callable[..., Any]) -> bool:
    """Whether calls return what ``contextlib.contextmanager`` makes of a generator, and run nothing of it yet."""
    made_by = contextlib.contextmanager(lambda: None).__code__
    return inspect.unwrap(function, stop=lambda f: f.__code__ is made_by).__code__ is made_by


def _returns_something(function: Callable[..., Any]) -> bool:
    """Whether there is a ``return`` with a value; a wrapper of a function without one need not hand anything on."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(tree))


def _call(hook: Hook, true: Callable[..., Any], body: Callable[..., Any], args: list, kwargs: dict) -> Any:
    if inspect.iscoroutinefunction(true):

        async def fake(*args: Any, **kwargs: Any) -> Any:
            return body(*args, **kwargs)

        result = import_object(hook.wrapper)(fake)(*args, **kwargs)
        # What verl decorates with its auto_await has run to its end where no loop is running.
        return asyncio.run(result) if inspect.iscoroutine(result) else result

    def fake(*args: Any, **kwargs: Any) -> Any:
        return body(*args, **kwargs)

    return import_object(hook.wrapper)(fake)(*args, **kwargs)


def _ways_to_call(target: Target, signature: inspect.Signature) -> dict[str, tuple[list, dict]]:
    """By position, by keyword, and with what is required alone; ``self`` always by position."""
    parameters = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    values = {p.name: _argument(p.name, target) for p in parameters}
    by_keyword = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name != "self"]
    required = [p.name for p in parameters if p.default is p.empty]

    def call(positional: list[str], keywords: list[str]) -> tuple[list, dict]:
        return [values[name] for name in positional], {name: values[name] for name in keywords}

    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    ways = {
        "by position": call([n for n in values if n not in keyword_only], keyword_only),
        "by keyword": call([n for n in values if n not in by_keyword], by_keyword),
        "required alone": call(
            [n for n in required if n not in keyword_only], [n for n in required if n in keyword_only]
        ),
    }
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        ways["unknown keyword"] = (ways["by position"][0], {**ways["by position"][1], "unheard_of": object()})
    return ways


def _argument(name: str, target: Target) -> Any:
    if name == "self":
        # As verl's own tests build them: no __init__ ran.
        owner = import_object(target.path.rpartition(".")[0])
        # Without a finalizer, which would miss what __init__ sets.
        bare = type(owner.__name__, (owner,), {"__del__": lambda self: None})
        bare.__abstractmethods__ = frozenset()
        return object.__new__(bare)
    if name == "config":
        from hydra import compose, initialize_config_module

        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer")
    return object()


def _contents(args: list, kwargs: dict) -> list[str]:
    from omegaconf import DictConfig, OmegaConf

    values = [*args, *kwargs.values()]
    return [OmegaConf.to_yaml(v) if isinstance(v, DictConfig) else repr(getattr(v, "__dict__", None)) for v in values]


def _same(signature: inspect.Signature, given: tuple, got: tuple) -> bool:
    """Whether the original got the very objects, under the same names, whether by position or by keyword."""
    first, second = (signature.bind(*args, **kwargs).arguments for args, kwargs in (given, got))
    return _identities(first) == _identities(second)


def _identities(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [id(v) for v in value] if isinstance(value, tuple) else _ids_of_mapping(value)
        for name, value in arguments.items()
    }


def _ids_of_mapping(value: Any) -> Any:
    return {key: id(item) for key, item in value.items()} if type(value) is dict else id(value)
