"""What the tests on a GPU share, and their rehearsal on a CPU.

A test that takes the fixture ``device`` runs the same code on every device: with ``VERL_FP16_REHEARSE_GPU_TESTS=1`` it
runs on the CPU, so that a change that breaks it is found where there is no GPU. What it is there for, it shows on a GPU
alone.

A report of pytest's (``--junitxml``) says where the tests ran and of which files they could have been:
benchmarks/gpu/collect_tests.py takes it from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

# What runs verl's engines and its trainer in tests is the same for every device.
sys.path += [str(Path(__file__).parents[1] / tier) for tier in ("engine", "e2e")]

REHEARSAL = "VERL_FP16_REHEARSE_GPU_TESTS"
FOLDER = Path(__file__).parent
_LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # after the mark was given
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a rehearsal, take the mark off that skips what can run without CUDA."""
    if not os.environ.get(REHEARSAL):
        return
    for item in items:
        if FOLDER in Path(item.path).parents and "device" in getattr(item, "fixturenames", ()):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count what -k and the like leave out of the tests in this folder."""
    for item in items:
        if FOLDER in Path(item.path).parents:
            item.config.stash[_LEFT_OUT] = item.config.stash.get(_LEFT_OUT, 0) + 1


@pytest.fixture(scope="session", autouse=True)
def _where(request: pytest.FixtureRequest, record_testsuite_property: Callable[[str, object], None]) -> None:
    """Put into pytest's report where the tests run. Another process looks: the GPU is left to the tests in this one."""
    if not request.config.getoption("xmlpath", None):
        return
    script = FOLDER.parents[1] / "benchmarks" / "gpu" / "facts.py"
    done = subprocess.run(
        [sys.executable, script, _device()], stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    told = json.loads(done.stdout.splitlines()[-1]) | {
        "rehearsal": bool(os.environ.get(REHEARSAL)),
        "files": sorted(f"tests/gpu/{file.name}" for file in FOLDER.glob("test_*.py")),
        "deselected": request.config.stash.get(_LEFT_OUT, 0),
    }
    record_testsuite_property("verl_fp16", json.dumps(told))


@pytest.fixture(scope="session")
def device() -> str:
    """cuda; in a rehearsal cpu."""
    return _device()


def _device() -> str:
    return "cpu" if os.environ.get(REHEARSAL) else "cuda"


@pytest.fixture(scope="session", params=(1, 2), ids=("one rank", "two ranks"))
def world_size(request: pytest.FixtureRequest, device: str) -> int:
    """Numbers of ranks, each with a GPU of its own."""
    import torch

    if device == "cuda" and torch.cuda.device_count() < request.param:
        pytest.skip(f"{request.param} GPUs are needed, and here is {torch.cuda.device_count()}")
    return request.param
