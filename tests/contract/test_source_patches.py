"""The source patches: current with the hooks, applied and reversed on every release, refused where they do not fit."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from releases import RELEASES, release_folder
from source_patches import PATCHES, diff

from verl_fp16.hooks import HOOKS
from verl_fp16.patching.static import SourceTree, patched_in_source, problems
from verl_fp16.source_patch import PatchRefused, State, apply, release_of, state_of


@pytest.fixture(params=RELEASES)
def tree(request, tmp_path) -> Path:
    """The files of one release that the patch is about, and its version, in a folder below a git repository."""
    root = tmp_path / "repository" / "vendored"
    copy_release(request.param, root)
    subprocess.run(["git", "init", "--quiet", str(root.parent)], check=True)
    return root


def copy_release(version: str, root: Path) -> None:
    files = [line[6:] for line in diff(version).splitlines() if line.startswith("+++ b/")]
    for file in (*files, "verl/version/version"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(release_folder(version) / file, root / file)


@pytest.mark.parametrize("version", RELEASES)
def test_the_patches_are_what_the_hooks_say(version):
    assert (PATCHES / f"verl-{version}.diff").read_text() == diff(version), "run scripts/source_patches.py"


def test_applied_and_reversed(tree):
    assert state_of(tree) is State.RELEASED
    assert apply(tree) is True
    assert state_of(tree) is State.PATCHED
    assert apply(tree) is False, "a second time there is nothing to do"
    version = release_of(tree)
    source = SourceTree(tree)
    for hook in HOOKS:
        if hook.is_for(version) and hook.target.qualname:
            assert patched_in_source(source.function(hook.target)), hook.name
    assert not any(problems(HOOKS, version, source).values())
    assert apply(tree, reverse=True) is True
    assert apply(tree, reverse=True) is False
    for path in (path for path in tree.rglob("*") if path.is_file()):
        assert filecmp.cmp(path, release_folder(version) / path.relative_to(tree), shallow=False), path


def test_a_changed_place_is_named_and_nothing_is_changed(tree):
    engine = tree / "verl/workers/engine/fsdp/transformer_impl.py"
    engine.write_text(engine.read_text().replace("def optimizer_step(self)", "def optimizer_step(self, closure=None)"))
    before = {path: path.read_bytes() for path in tree.rglob("*.py")}
    for reverse in (False, True):
        with pytest.raises(PatchRefused, match="does not fit .*transformer_impl.py:"):
            apply(tree, reverse=reverse)
    assert {path: path.read_bytes() for path in tree.rglob("*.py")} == before


@pytest.mark.parametrize(
    ("version", "accepted"), (("0.9.1.dev", True), ("0.9.2", False), ("0.7.1", False), ("?", False))
)
def test_the_release_is_read_from_the_tree(tmp_path, version, accepted):
    (tmp_path / "verl" / "version").mkdir(parents=True)
    (tmp_path / "verl" / "version" / "version").write_text(version + "\n")
    if accepted:
        assert release_of(tmp_path) == "0.9.1"
    else:
        with pytest.raises(PatchRefused, match="there are patches for 0.8.0, 0.9.0, 0.9.1 only"):
            release_of(tmp_path)


def test_what_is_no_verl(tmp_path):
    with pytest.raises(PatchRefused, match="is no source tree of verl"):
        apply(tmp_path)


def test_without_git(tree, monkeypatch):
    monkeypatch.setenv("PATH", str(tree))
    with pytest.raises(PatchRefused, match="git was not found"):
        apply(tree)


@pytest.mark.parametrize("version", RELEASES)
def test_a_patched_release_imports_and_its_hooks_are_not_needed(tmp_path, version):
    """In a fresh process: the calls are in place, the runtime hooks leave the targets alone.

    verl imports vLLM's CPU build with the CPU room only, which verl 0.8.0 has no place for.
    """
    vllm = "verl.workers.rollout.vllm_rollout" if version == "0.8.0" else "-"
    root = tmp_path / "patched"
    shutil.copytree(release_folder(version), root)
    apply(root)
    code = (
        "import verl, json, importlib; from verl_fp16.hooks import HOOKS, patcher;"
        "import verl_fp16.plugin as plugin; plugin.require_active(verify=True);"
        f"hooks = [h for h in HOOKS if not h.target.module.startswith({vllm!r})];"
        "[importlib.import_module(h.target.module) for h in hooks if h.is_for(verl.__version__)];"
        "plugin.require_active(verify=True);"
        "print(verl.__file__); print(json.dumps({h.name: patcher.status()[h.name] for h in hooks}))"
    )
    platform = "" if version == "0.8.0" else "cpu"
    environment = {**os.environ, "PYTHONPATH": str(root), "VERL_PLATFORM": platform, "VERL_USE_EXTERNAL_MODULES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    file, statuses = done.stdout.strip().splitlines()[-2:]
    assert file.startswith(str(root))
    words = {status.partition(":")[0] for status in json.loads(statuses).values()}
    assert words == {"not needed"}, statuses


def test_the_command(tree, tmp_path):
    from typer.testing import CliRunner

    from verl_fp16.cli.app import app

    def call(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["patch-source", *map(str, arguments)])
        return result.exit_code, result.output

    steps = (
        ((tree, "--check"), 0, "not patched; the patch of this release fits"),
        ((tree, "--reverse"), 0, "not patched already"),
        ((tree,), 0, "patched"),
        ((tree, "--check"), 0, ", patched; the patch"),
        ((tree,), 0, "patched already: nothing to do"),
        ((tree, "--reverse"), 0, "no longer patched"),
        ((tree, "--reverse", "--check"), 2, "exclude each other"),
        ((tmp_path,), 1, "is no source tree of verl"),
    )
    for arguments, code, text in steps:
        found, output = call(*arguments)
        assert (found, text in output) == (code, True), (arguments, output)
