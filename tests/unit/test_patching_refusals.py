"""What a patcher refuses: unknown releases, changed bodies, foreign wraps; and that it then leaves nothing behind."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

from verl_fp16.patching import Hook, Package, Patcher, PatchError, Target
from verl_fp16.patching.chain import IN_SOURCE, wrap
from verl_fp16.patching.fingerprint import fingerprint_of

LIBRARY = '''
"""A package of which hooks know release 1.0 and 1.1."""
__version__ = "VERSION"

def free(value):
    """Documentation does not count."""
    return value + 1  # nor do comments

class Thing:
    def method(self, value):
        return value + 1

def other(value):
    return value - 1
'''
WRAPPERS = """
def times_ten(original):
    def wrapper(*args):
        return original(*args) * 10
    return wrapper
"""
PACKAGE = Package("libpackage", ("1.0", "1.1"))


@pytest.fixture
def make(tmp_path: Path, monkeypatch):
    """Writes the package, with replacements in its source, and makes it importable."""

    def write(version: str = "1.0", **replace: str) -> Path:
        source = LIBRARY.replace("VERSION", version)
        for old, new in replace.values():
            assert old in source
            source = source.replace(old, new)
        (tmp_path / "libpackage").mkdir(exist_ok=True)
        (tmp_path / "libpackage" / "__init__.py").write_text(source)
        (tmp_path / "wrappers.py").write_text(WRAPPERS)
        return tmp_path

    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("libpackage", "wrappers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield write
    for name in ("libpackage", "wrappers"):
        sys.modules.pop(name, None)


def hook(name: str, path: str = "libpackage:free", **fields) -> Hook:
    bodies, parameters = fields.pop("bodies", ()), fields.pop("parameters", ())
    return Hook(name, Target(path, parameters, bodies), "wrappers:times_ten", "why", "how", **fields)


@pytest.mark.parametrize("version", ("0.9", "1.2", "2.0.dev0", "local build"))
def test_an_unknown_release_is_refused_with_target_version_and_the_way_out(make, version):
    make(version)
    import libpackage

    patcher = Patcher((hook("a"), hook("b", "libpackage:Thing.method")), PACKAGE)
    patcher.apply()
    assert (libpackage.free(1), libpackage.Thing().method(1)) == (2, 2), "nothing was put in place"
    for check in (patcher.require, patcher.verify):
        with pytest.raises(PatchError) as caught:
            check()
        for part in ("hook 'a'", f"libpackage {version}", "1.0, 1.1", "pip install libpackage==1.1"):
            assert part in str(caught.value)
    assert "libpackage:free" in patcher.status()["a"]
    patcher.undo()


def test_a_development_version_counts_as_the_release_it_leads_to(make):
    make("1.1.dev3")
    import libpackage

    patcher = Patcher((hook("a"),), PACKAGE)
    patcher.require()
    assert libpackage.free(1) == 20
    patcher.undo()


@pytest.mark.parametrize(("version", "expected"), (("1.0", (20, 2)), ("1.1", (2, 20))))
def test_a_hook_outside_its_range_is_not_needed(make, version, expected):
    make(version)
    import libpackage

    patcher = Patcher((hook("old", before="1.1"), hook("new", "libpackage:Thing.method", since="1.1")), PACKAGE)
    patcher.require()
    assert (libpackage.free(1), libpackage.Thing().method(1)) == expected
    statuses = sorted(status.partition(":")[0] for status in patcher.status().values())
    assert statuses == ["applied", "not needed"]
    patcher.undo()
    assert (libpackage.free(1), libpackage.Thing().method(1)) == (2, 2)


def test_one_hook_that_does_not_fit_takes_all_others_out(make):
    make()
    import libpackage

    before = libpackage.free, libpackage.Thing.method
    patcher = Patcher((hook("a"), hook("b", "libpackage:Thing.method"), hook("c", "libpackage:gone")), PACKAGE)
    patcher.apply()
    assert (libpackage.free, libpackage.Thing.method) == before
    status = patcher.status()
    assert status["c"] == "refused: libpackage:gone does not exist in this release"
    assert status["a"] == status["b"] == "withdrawn: hook 'c' was refused"
    patcher.apply()
    assert libpackage.free is before[0], "a second apply() does not patch by halves either"
    with pytest.raises(PatchError, match="hook 'c'"):
        patcher.require()
    patcher.undo()


def test_hooks_of_modules_imported_earlier_are_taken_out_by_a_later_refusal(make, tmp_path):
    make()
    (tmp_path / "late.py").write_text("def late(value):\n    return value\n")
    patcher = Patcher((hook("a"), hook("b", "late:gone")), PACKAGE)
    patcher.apply()
    import libpackage

    assert libpackage.free(1) == 20
    import late  # noqa: F401

    assert libpackage.free(1) == 2
    patcher.undo()
    sys.modules.pop("late")


@pytest.mark.parametrize(
    ("change", "known"),
    (
        (("value + 1  # nor", "value + 2  # nor"), False),
        (("def free(value)", "def free(value, more=None)"), False),
        (("# nor do comments", "# other words"), True),
        (("Documentation does", "Docs do"), True),
        (("def free", "\n\ndef free"), True),
    ),
)
def test_a_body_that_is_not_the_known_one_is_refused(make, change, known):
    make()
    import libpackage

    bodies = (fingerprint_of(libpackage.free),)
    sys.modules.pop("libpackage")
    import verl_fp16.patching.fingerprint as module

    module._functions_of.cache_clear()
    make(free=change)
    import libpackage

    patcher = Patcher((hook("a", bodies=bodies),), PACKAGE)
    if known:
        patcher.verify()
        patcher.require()
        assert libpackage.free(1) == 20
    else:
        for check in (patcher.verify, patcher.require):
            with pytest.raises(PatchError, match="the body of libpackage:free .* is none of those"):
                check()
        assert not hasattr(libpackage.free, "__wrapped__")
    patcher.undo()


def test_a_changed_body_that_a_hook_only_relies_on_is_refused(make):
    make()
    patcher = Patcher((hook("a", relies_on=(Target("libpackage:other", bodies=("0" * 16,)),)),), PACKAGE)
    patcher.apply()
    import libpackage

    assert libpackage.free(1) == 2
    with pytest.raises(PatchError, match="hook 'a': the body of libpackage:other"):
        patcher.require()
    patcher.undo()


def test_verify_names_every_target_that_does_not_fit_and_imports_nothing(make):
    make()
    hooks = (
        hook("a", parameters=("value",)),
        hook("b", "libpackage:gone"),
        hook("c", "libpackage.nowhere:free"),
        hook("d", "libpackage:Thing.method", parameters=("value", "more")),
    )
    import libpackage  # noqa: F401  the package itself, for its version

    with pytest.raises(PatchError) as caught:
        Patcher(hooks, PACKAGE).verify()
    message = str(caught.value)
    assert "hook 'a'" not in message
    assert "hook 'b': libpackage:gone does not exist" in message
    assert "hook 'c': libpackage.nowhere:free: there is no module libpackage.nowhere" in message
    assert "hook 'd': libpackage:Thing.method(self, value) lacks the parameters ['more']" in message


def test_a_wrap_that_somebody_replaced_is_noticed(make):
    make()
    import libpackage

    patcher = Patcher((hook("a"),), PACKAGE)
    patcher.require()
    libpackage.free = lambda value: value
    assert patcher.status()["a"].startswith("refused: libpackage:free was replaced")
    with pytest.raises(PatchError, match="was replaced after it had been wrapped"):
        patcher.require()
    patcher.undo()
    assert libpackage.free(1) == 1, "undo leaves the other's function alone"


def test_a_wrap_of_somebody_else_over_ours_stays_and_undo_says_so(make):
    make()
    import libpackage

    original = libpackage.free
    patcher = Patcher((hook("a"),), PACKAGE)
    patcher.require()
    ours = libpackage.free

    @functools.wraps(ours)
    def theirs(value):
        return ours(value) + 100

    libpackage.free = theirs
    assert patcher.status() == {"a": "applied"}, "calls still go through it"
    with pytest.raises(PatchError, match=f"was changed by {__name__} after this package wrapped it"):
        patcher.undo()
    assert libpackage.free(1) == 120
    libpackage.free = ours
    patcher.undo()
    assert libpackage.free is original


def test_a_hook_that_the_source_carries_is_not_needed(make):
    make()
    import libpackage
    import wrappers

    in_source = wrap("a", wrappers.times_ten, libpackage.free)
    setattr(in_source, IN_SOURCE, "a")
    libpackage.free = in_source
    patcher = Patcher((hook("a", bodies=("0" * 16,)), hook("b", "libpackage:other")), PACKAGE)
    patcher.require()
    assert libpackage.free is in_source
    assert libpackage.free(1) == 20, "applied once"
    assert patcher.status() == {"a": "not needed: the source of this installation carries it", "b": "applied"}
    patcher.undo()
    assert libpackage.free is in_source


def test_a_package_that_is_not_installed():
    patcher = Patcher((hook("a"),), Package("libpackage_that_is_not_there", ("1.0",)))
    patcher.apply()
    with pytest.raises(PatchError, match="libpackage_that_is_not_there is not installed here; install"):
        patcher.require()
