"""What the tests on a GPU share, and their rehearsal on a CPU.

A test that takes the fixture ``device`` runs the same code on every device: with ``VERL_FP16_REHEARSE_GPU_TESTS=1`` it
runs on the CPU, so that a change that breaks it is found where there is no GPU. What it is there for, it shows on a GPU
alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# What runs verl's engines and its trainer in tests is the same for every device.
sys.path += [str(Path(__file__).parents[1] / tier) for tier in ("engine", "e2e")]

REHEARSAL = "VERL_FP16_REHEARSE_GPU_TESTS"


@pytest.hookimpl(trylast=True)  # after the mark was given
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a rehearsal, take the mark off that skips what can run without CUDA."""
    if not os.environ.get(REHEARSAL):
        return
    for item in items:
        if Path(__file__).parent in Path(item.path).parents and "device" in getattr(item, "fixturenames", ()):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]


@pytest.fixture(scope="session")
def device() -> str:
    """cuda; in a rehearsal cpu."""
    return "cpu" if os.environ.get(REHEARSAL) else "cuda"


@pytest.fixture(scope="session", params=(1, 2), ids=("one rank", "two ranks"))
def world_size(request: pytest.FixtureRequest, device: str) -> int:
    """Numbers of ranks, each with a GPU of its own."""
    import torch

    if device == "cuda" and torch.cuda.device_count() < request.param:
        pytest.skip(f"{request.param} GPUs are needed, and here is {torch.cuda.device_count()}")
    return request.param
