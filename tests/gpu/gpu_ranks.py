"""Runs a function of a test module on several ranks, each in a fresh process with a GPU of its own and NCCL.

With the device cpu, for rehearsals, over gloo. Imports neither torch nor verl.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_processes import RankProcesses

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 500


def needs(*modules: str) -> pytest.MarkDecorator:
    """A mark that skips where a module is missing. The modules are not imported: verl chooses a device when it is."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed here")


def on_devices(world_size: int, function: Callable[..., Any], *args: Any, folder: Path, device: str) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks and return what each rank returned, in the order of ranks.

    Args:
        function: a function of a test module (found by name in the child processes).
        folder: for the files of this call.
        device: cuda or cpu. What is returned must be on the CPU.

    Raises:
        AssertionError: a rank failed; with its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check = (
        "assert 'verl_fp16.plugin' in sys.modules, 'verl did not load verl_fp16: install it (pip install --no-deps .)'"
    )
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    if device == "cpu":
        environment["VERL_PLATFORM"] = "cpu"
    return RankProcesses(device, check, environment, TIMEOUT_S).call(world_size, function, args, folder)


def settled_state(engine: Any) -> list[tuple[str, Any]]:
    """``engines.state_of`` on the CPU; copies that are under way, as of an offload, are waited for."""
    import torch
    from engines import state_of

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return [(name, tensor.cpu()) for name, tensor in state_of(engine)]
