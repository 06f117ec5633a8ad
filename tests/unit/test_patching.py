"""The patching core: every order of import, apply and undo, in fresh processes; failures by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from verl_fp16.patching import Hook, Patcher, PatchError, Target

LIBRARY = """
def free(value):
    return value + 1

class Base:
    def inherited(self, value):
        return value + 1

class Thing(Base):
    def method(self, value):
        return value + 1

    @staticmethod
    def static(value):
        return value + 1

    @classmethod
    def of_class(cls, value):
        return value + 1
"""
WRAPPERS = """
def times_ten(original):
    def wrapper(*args):
        return original(*args) * 10
    return wrapper

def times_three(original):
    def wrapper(*args):
        return original(*args) * 3
    return wrapper

def plus_one(original):
    def wrapper(*args):
        return original(*args) + 1
    return wrapper

def refuse(original):
    raise ValueError("this wrapper refuses")

def on_module(module):
    module.seen = True
    return lambda: delattr(module, "seen")
"""
PROGRAM = """
import itertools, os, sys, traceback
from verl_fp16.patching import Hook, Patcher, Target

paths = ("free", "Thing.method", "Thing.static", "Thing.of_class", "Thing.inherited")
def hooks(name, wrapper):
    return tuple(Hook(name + p, Target("library:" + p, ("value",)), "wrappers:" + wrapper, "why", "how") for p in paths)

first = Patcher((*hooks("first.", "times_ten"), Hook("module", Target("library"), "wrappers:on_module", "why", "how")))
second = Patcher(hooks("second.", "times_three"))
actions = {"apply": first.apply, "undo": first.undo, "apply2": second.apply, "undo2": second.undo}

def results():
    from library import Thing, free
    return [free(1), Thing().method(1), Thing.static(1), Thing.of_class(1), Thing().inherited(1)]

def originals():
    import library
    return [library.free, *(vars(library.Thing).get(n) for n in ("method", "static", "of_class", "inherited"))]

def run(order):
    on, before = set(), None
    for action in order:
        if action == "import":
            import library
            if before is None and not on:
                before = originals()
        else:
            actions[action]()
            (on.add if action.startswith("apply") else on.discard)("second" if action.endswith("2") else "first")
        if "library" in sys.modules:
            expected = 2 * (10 if "first" in on else 1) * (3 if "second" in on else 1)
            assert results() == [expected] * 5, (action, on, results())
            assert hasattr(sys.modules["library"], "seen") is ("first" in on)
    if not on and before is not None:
        assert all(a is b for a, b in zip(originals(), before)), "undo restores the very objects"
    import library
    assert library.Base().inherited(1) == 2, "a wrap on a subclass leaves the base class alone"
    assert library.__spec__.loader.__class__.__name__ == "SourceFileLoader"

names, length, passed = sys.argv[1].split(","), int(sys.argv[2]), 0
for order in itertools.product(names, repeat=length):
    child = os.fork()  # a process of its own, in which nothing has been imported or patched
    if child == 0:
        try:
            run(order)
        except BaseException:
            print(order, traceback.format_exc())
            os._exit(1)
        os._exit(0)
    passed += os.waitpid(child, 0)[1] == 0
print("passed", passed)
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "library.py").write_text(LIBRARY)
    (tmp_path / "wrappers.py").write_text(WRAPPERS)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


@pytest.mark.parametrize(
    ("actions", "length"),
    (("import,apply,undo", 5), ("import,apply,undo,apply2,undo2", 4)),
    ids=("one patcher", "two patchers on the same attributes"),
)
def test_every_order_of_import_apply_and_undo(library, actions, length):
    """All sequences of the actions, each in a fresh process: 243 and 625 of them."""
    command = [sys.executable, "program.py", actions, str(length)]
    done = subprocess.run(command, cwd=library, capture_output=True, text=True, timeout=300)
    assert done.stdout == f"passed {len(actions.split(',')) ** length}\n", done.stdout + done.stderr


def _patcher(library: Path, monkeypatch, target: str, wrapper: str = "wrappers:times_ten", parameters=()) -> Patcher:
    monkeypatch.syspath_prepend(str(library))
    for name in ("library", "wrappers"):
        sys.modules.pop(name, None)
    return Patcher((Hook("the.hook", Target(target, parameters), wrapper, "why", "how"),))


@pytest.mark.parametrize(
    ("target", "wrapper", "parameters", "message"),
    (
        ("library:gone", "wrappers:times_ten", (), "hook 'the.hook': library:gone does not exist"),
        ("library:Thing.gone", "wrappers:times_ten", (), "library:Thing.gone does not exist"),
        ("library:free", "wrappers:times_ten", ("other",), "lacks the parameters ['other']"),
        ("library:free", "wrappers:refuse", (), "this wrapper refuses"),
        ("library:free", "wrappers:missing", (), "has no attribute 'missing'"),
    ),
)
def test_a_hook_that_does_not_fit_is_raised_where_it_is_required(
    library, monkeypatch, target, wrapper, parameters, message
):
    patcher = _patcher(library, monkeypatch, target, wrapper, parameters)
    patcher.apply()
    import library as module

    assert module.free(1) == 2, "importing the library works without the hook"
    with pytest.raises(PatchError) as caught:
        patcher.require()
    assert message in str(caught.value)
    assert patcher.status()["the.hook"].startswith("refused: ")
    patcher.undo()


def test_once_required_a_late_failure_is_raised_by_the_import(library, monkeypatch):
    patcher = _patcher(library, monkeypatch, "library:gone")
    patcher.apply()
    patcher.require()
    with pytest.raises(PatchError, match="library:gone"):
        import library as module  # noqa: F401
    patcher.undo()


def test_a_second_import_after_a_late_failure_fails_too(library, monkeypatch):
    patcher = _patcher(library, monkeypatch, "library:gone")
    patcher.apply()
    patcher.require()
    for _ in range(2):
        with pytest.raises(PatchError, match="library:gone"):
            import library as module  # noqa: F401
    patcher.undo()


def test_a_module_that_is_executed_anew_is_wrapped_anew(library, monkeypatch):
    import importlib

    patcher = _patcher(library, monkeypatch, "library:free")
    patcher.apply()
    import library as module

    assert module.free(1) == 20
    assert importlib.reload(module).free(1) == 20
    del sys.modules["library"]
    import library as again

    assert again is not module
    assert again.free(1) == 20
    patcher.undo()


def test_applied_while_the_target_is_being_imported(library, monkeypatch):
    """The finder comes too late for that import; require() sees to it that the hook is not left out."""
    (library / "library.py").write_text("import starter\n" + LIBRARY)
    (library / "starter.py").write_text("import holder; holder.patcher.apply()")
    (library / "holder.py").write_text("patcher = None")
    monkeypatch.syspath_prepend(str(library))
    patcher = _patcher(library, monkeypatch, "library:free")
    import holder

    holder.patcher = patcher
    import library as module

    patcher.require()
    assert module.free(1) == 20
    assert patcher.status() == {"the.hook": "applied"}
    patcher.undo()


@pytest.mark.parametrize("imported_before", (True, False))
def test_two_hooks_on_one_attribute_the_later_one_outermost(library, monkeypatch, imported_before):
    monkeypatch.syspath_prepend(str(library))
    for name in ("library", "wrappers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    both = [
        Hook(name, Target("library:Thing.method", ("value",)), f"wrappers:{name}", "why", "how")
        for name in ("times_ten", "plus_one")
    ]
    for hooks, wrapped in ((both, 2 * 10 + 1), (both[::-1], (2 + 1) * 10)):
        if not imported_before:
            sys.modules.pop("library", None)
        else:
            import library as module

            before = vars(module.Thing)["method"]
        patcher = Patcher(tuple(hooks))
        patcher.apply()
        import library as module

        patcher.require()
        assert module.Thing().method(1) == wrapped
        assert set(patcher.status().values()) == {"applied"}
        patcher.undo()
        assert module.Thing().method(1) == 2
        assert not imported_before or vars(module.Thing)["method"] is before


def test_two_hooks_of_one_name_are_refused():
    hook = Hook("same", Target("library:free"), "wrappers:times_ten", "why", "how")
    with pytest.raises(PatchError, match="not unique"):
        Patcher((hook, hook))
