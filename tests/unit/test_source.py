"""The calls that a source patch puts into verl: the declared wrapper, lazily; nothing with the switch off."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest

from verl_fp16 import hooks, source
from verl_fp16.patching import Hook, Patcher, PatchError, Target
from verl_fp16.patching.chain import IN_SOURCE

WRAPPERS = """
imported = True
def times_ten(original):
    def wrapper(*args):
        return original(*args) * 10
    return wrapper

def async_times_ten(original):
    async def wrapper(*args):
        return await original(*args) * 10
    return wrapper

def on_module(module):
    module.seen = True
    return lambda: delattr(module, "seen")
"""


@pytest.fixture(autouse=True)
def declared(monkeypatch, tmp_path):
    (tmp_path / "wrappers_of_source.py").write_text(WRAPPERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wrappers_of_source", raising=False)
    made = tuple(
        Hook(name, Target(target), f"wrappers_of_source:{wrapper}", "why", "how")
        for name, target, wrapper in (
            ("a.function", "patched_library:function", "times_ten"),
            ("a.coroutine", "patched_library:coroutine", "async_times_ten"),
            ("a.module", "patched_library", "on_module"),
        )
    )
    monkeypatch.setattr(hooks, "HOOKS", made)
    library = ModuleType("patched_library")
    monkeypatch.setitem(sys.modules, "patched_library", library)
    return library, made


def function(value):
    """Its documentation."""
    return value + 1


async def coroutine(value):
    return value + 1


def test_the_wrapper_is_imported_at_the_first_call(declared):
    wrapped = source.verl_fp16_hook("a.function")(function)
    assert "wrappers_of_source" not in sys.modules
    assert (wrapped.__name__, wrapped.__doc__) == (function.__name__, function.__doc__)
    assert [wrapped(1), wrapped(2)] == [20, 30]


def test_a_coroutine_function_stays_one():
    import asyncio

    wrapped = source.verl_fp16_hook("a.coroutine")(coroutine)
    assert inspect.iscoroutinefunction(wrapped)
    assert asyncio.run(wrapped(1)) == 20


def test_a_module_hook(declared):
    library, _ = declared
    source.verl_fp16_module_hook("patched_library", "a.module")
    assert library.seen
    assert getattr(library, IN_SOURCE) == ("a.module",)


def test_the_patcher_leaves_all_of_them_alone(declared):
    library, made = declared
    library.function = source.verl_fp16_hook("a.function")(function)
    library.coroutine = source.verl_fp16_hook("a.coroutine")(coroutine)
    source.verl_fp16_module_hook("patched_library", "a.module")
    before = dict(vars(library))
    patcher = Patcher(made)
    patcher.require()
    assert {status.partition(":")[0] for status in patcher.status().values()} == {"not needed"}
    assert dict(vars(library)) == before
    assert library.function(1) == 20, "once"


def test_a_hook_may_rely_on_a_body_that_another_one_was_put_on_in_the_source(declared):
    library, (first, *_) = declared
    library.function, library.other = source.verl_fp16_hook("a.function")(function), coroutine
    known = Target("patched_library:function", bodies=("0" * 16,))
    second = Hook(
        "a.other",
        Target("patched_library:other"),
        "wrappers_of_source:async_times_ten",
        "why",
        "how",
        relies_on=(known,),
    )
    patcher = Patcher((first, second))
    patcher.require()
    assert [status.partition(":")[0] for status in patcher.status().values()] == ["not needed", "applied"]
    patcher.undo()
    library.function = function
    with pytest.raises(PatchError, match="the body of patched_library:function .* is none of those"):
        Patcher((second,)).require()


def test_nothing_with_the_switch(declared, monkeypatch):
    monkeypatch.setenv("VERL_FP16_DISABLE", "1")
    assert source.verl_fp16_hook("a.function")(function) is function
    source.verl_fp16_module_hook("patched_library", "a.module")
    assert not hasattr(declared[0], "seen")


def test_a_patch_of_another_release_of_ours():
    with pytest.raises(PatchError, match="hook 'a.gone', which the installed verl_fp16 does not have"):
        source.verl_fp16_hook("a.gone")(function)
