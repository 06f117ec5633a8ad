"""Every target of every hook against the source of every supported verl, without importing verl or torch."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from releases import RELEASES, release_folder

from verl_fp16.cpu.hooks import CPU_HOOKS
from verl_fp16.cpu.plugin import DRIVER_HOOKS
from verl_fp16.hooks import HOOKS
from verl_fp16.patching.fingerprint import fingerprint
from verl_fp16.patching.records import Package, Target
from verl_fp16.patching.static import SourceTree, problems

ALL = (*HOOKS, *DRIVER_HOOKS, *CPU_HOOKS)
OF_VERL = [hook for hook in ALL if hook.target.module.partition(".")[0] == "verl"]
PACKAGE = Path(importlib.import_module("verl_fp16").__file__).parent


@pytest.fixture(scope="module")
def trees() -> dict[str, SourceTree]:
    return {version: SourceTree(release_folder(version)) for version in RELEASES}


@pytest.mark.parametrize("version", RELEASES)
def test_every_target_fits_every_release_it_is_for(trees, version):
    found = problems(OF_VERL, version, trees[version])
    assert {name: messages for name, messages in found.items() if messages} == {}
    assert found, "no hook is for this release"


def test_each_hook_is_for_a_supported_release():
    for hook in OF_VERL:
        assert any(hook.is_for(version) for version in RELEASES), hook.name


def test_no_fingerprint_is_stale(trees):
    """Each fingerprint is that of some supported release: a body that no release has any more is not 'known'."""
    for hook in OF_VERL:
        for target in (hook.target, *hook.relies_on):
            found = {fingerprint(trees[v].function(target)) for v in RELEASES if target.bodies and hook.is_for(v)}
            assert found == set(target.bodies), (hook.name, target.path)


@pytest.mark.parametrize("hook", OF_VERL, ids=lambda hook: hook.name)
def test_a_target_that_moved_is_found_out(trees, tmp_path, hook):
    """Planted: the function is renamed, then its parameters, then (where a body counts) a statement is added."""
    version = next(version for version in reversed(RELEASES) if hook.is_for(version))
    for target in (hook.target, *hook.relies_on):
        if not target.qualname:
            continue
        source = trees[version].path(target.module).read_text()
        definition = trees[version].function(target)
        lines = source.splitlines(keepends=True)
        head = lines[definition.lineno - 1]
        plants = {"does not exist": head.replace(f"def {definition.name}(", f"def {definition.name}_moved(")}
        if target.bodies:
            indent = " " * (definition.body[0].col_offset)
            last = lines[definition.end_lineno - 1]
            plants["none of those"] = {definition.end_lineno - 1: f"{last}\n{indent}print()\n"}
        for message, plant in plants.items():
            changed = list(lines)
            for index, line in plant.items() if isinstance(plant, dict) else [(definition.lineno - 1, plant)]:
                changed[index] = line
            path = tmp_path.joinpath(*target.module.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(changed))
            listed = problems([hook], version, SourceTree(tmp_path))[hook.name]
            assert any(target.path in found and message in found for found in listed), (target.path, listed)


def test_a_release_without_the_module_is_found_out(tmp_path):
    for hook in OF_VERL:
        version = next(version for version in RELEASES if hook.is_for(version))
        assert "there is no module" in problems([hook], version, SourceTree(tmp_path))[hook.name][0]


def test_it_takes_no_torch_and_no_verl():
    code = (
        "import sys, json; sys.path[:0] = json.loads(sys.argv[1]);"
        "from releases import RELEASES, release_folder;"
        "from verl_fp16.hooks import HOOKS; from verl_fp16.patching.static import SourceTree, problems;"
        "[problems(HOOKS, v, SourceTree(release_folder(v))) for v in RELEASES];"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'verl', 'ray', 'vllm', 'transformers'}))"
    )
    paths = json.dumps([path for path in sys.path if path])
    done = subprocess.run([sys.executable, "-c", code, paths], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_wrappers_and_records_are_complete_both_ways():
    """Each record's wrapper is defined, and each function of a hook module that takes ``original`` has a record."""
    declared = {hook.wrapper for hook in ALL}
    defined = set()
    for path in (*PACKAGE.glob("hooks/*.py"), *PACKAGE.glob("cpu/*.py")):
        module = ".".join(("verl_fp16", *path.relative_to(PACKAGE).with_suffix("").parts))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and [a.arg for a in node.args.args] in (["original"], ["module"]):
                defined.add(f"{module}:{node.name}")
    assert declared - defined == set(), "a record names a wrapper that is not there"
    assert defined - declared == set(), "a wrapper that no record names"


def test_records_say_what_they_have_to():
    for hook in ALL:
        assert hook.why and hook.how and hook.until, hook.name
        assert re.fullmatch(r"[a-z]+\.[a-z0-9_]+", hook.name), hook.name
    assert len({hook.name for hook in ALL}) == len(ALL)


def test_the_installed_verl_is_a_supported_one():
    import importlib.metadata

    assert Package("verl", RELEASES).knows(importlib.metadata.version("verl"))


@pytest.mark.parametrize("change", ("released", "comment", "modified"))
def test_a_modified_body_in_a_whole_release(tmp_path, change):
    """A copy of the newest release: as it is, with a comment more, and with one number changed in optimizer_step."""
    version = RELEASES[-1]
    target = Target("verl.workers.engine.fsdp.transformer_impl:FSDPEngine.optimizer_step")
    path = tmp_path.joinpath(*target.module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    shutil.copy(SourceTree(release_folder(version)).path(target.module), path)
    source = path.read_text()
    edits = {
        "released": ("", ""),
        "comment": ("scaler.step(self.optimizer)", "scaler.step(self.optimizer)  # a word"),
        "modified": ("scaler.step(self.optimizer)", "self.optimizer.step()"),
    }
    old, new = edits[change]
    path.write_text(source.replace(old, new) if old else source)
    hook = next(hook for hook in HOOKS if hook.name == "engine.optimizer_step")
    assert bool(problems([hook], version, SourceTree(tmp_path))[hook.name]) is (change == "modified")
