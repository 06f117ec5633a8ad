"""A verl or a plugin that does not fit the flag: the launcher ends with one clear error, before Ray starts."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from releases import RELEASES, release_folder

COMMAND = [sys.executable, "-m", "verl.trainer.main_ppo", "+precision=fp16", "+hardware=cpu"]
ENGINE = "verl/workers/engine/fsdp/transformer_impl.py"


@dataclass(frozen=True)
class Start:
    code: int
    out: str
    err: str
    processor_seconds: float  # the wall clock says nothing on a busy machine


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A copy of the newest release that a test may change."""
    root = tmp_path_factory.mktemp("release") / "verl-copy"
    shutil.copytree(release_folder(RELEASES[-1]), root)
    return root


def start(folder: Path, *path: Path, **environment: str) -> Start:
    """Start a run with the flag, in a fresh Hydra folder, with ``path`` in front of Python's."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "RAY_ADDRESS": "local", **environment}
    env.pop("VERL_USE_EXTERNAL_MODULES", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*COMMAND, f"hydra.run.dir={folder}"], env=env, cwd=folder, capture_output=True, text=True, timeout=120
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return Start(done.returncode, done.stdout, done.stderr, used)


def assert_refused(run: Start, *parts: str) -> None:
    assert run.code != 0
    assert "ray init kwargs" not in run.out, "Ray was about to start"
    for part in parts:
        assert part in run.err, run.err[-3000:]
    assert run.err.count(parts[0]) == 1, "said once"
    assert "Traceback" not in run.err, run.err[-3000:]
    assert run.processor_seconds < 30


def edit(path: Path, old: str, new: str):
    """Change a file of the copy; returns a function that changes it back."""
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new))
    return lambda: path.write_text(before)


def test_an_unknown_verl(release, tmp_path):
    restore = edit(release / "verl/version/version", RELEASES[-1], "0.10.0")
    try:
        run = start(tmp_path, release)
    finally:
        restore()
    assert_refused(
        run,
        "verl 0.10.0 is not one of the releases",
        "verl.utils.device:auto_set_device",
        f"pip install verl=={RELEASES[-1]}",
    )


def test_a_modified_body(release, tmp_path):
    """In a module that the driver never imports."""
    restore = edit(release / ENGINE, "scaler.step(self.optimizer)", "self.optimizer.step()")
    try:
        run = start(tmp_path, release)
    finally:
        restore()
    assert_refused(run, "FSDPEngine.optimizer_step", "is none of those", "hook 'engine.optimizer_step'", "patch-source")


def test_a_broken_plugin(tmp_path):
    """A module of ours that cannot be imported, as after a half-finished installation."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['verl_fp16.hooks.driver'] = None\n")
    assert_refused(start(tmp_path, tmp_path), "verl_fp16.hooks.driver halted", "the verl_fp16 precision flag is set")


@pytest.mark.parametrize(
    ("environment", "parts"),
    (
        ({"VERL_FP16_DISABLE": "1"}, ("VERL_FP16_DISABLE=1 switches verl_fp16 off", "drop the flag")),
        ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, ("did not load", "VERL_USE_EXTERNAL_PLUGINS=none")),
        (
            {"VERL_USE_EXTERNAL_PLUGINS": "verl_fp16"},
            ("hardware=cpu is set", "must be unset, 'auto', or name verl_fp16_cpu"),
        ),
    ),
)
def test_a_plugin_that_is_switched_off(tmp_path, environment, parts):
    assert_refused(start(tmp_path, **environment), *parts)
