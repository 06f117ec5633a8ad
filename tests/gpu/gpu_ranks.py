"""Runs a function of a test module on several ranks, each in a fresh process with a GPU of its own and NCCL.

With the device cpu, for rehearsals, over gloo. Imports neither torch nor verl.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 500

_CHILD = """
import pickle, sys
module, name, args, device, rank, world, store, result, path = pickle.load(open(sys.argv[1], "rb"))
sys.path.extend(path)
import torch, torch.distributed as dist
if device == "cuda":
    torch.cuda.set_device(rank)
else:
    torch.set_num_threads(1)
import verl
assert "verl_fp16.plugin" in sys.modules, "verl did not load verl_fp16: install it (pip install --no-deps .)"
backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "cpu:gloo"
dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
value = getattr(__import__(module), name)(*args)
with open(result, "wb") as file:
    torch.save(value, file)
dist.barrier()
dist.destroy_process_group()
"""


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
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    module = function.__module__.split(".")[-1]
    children = []
    for rank in range(world_size):
        call, result = folder / f"call-{rank}.pkl", folder / f"result-{rank}.pt"
        store = f"tcp://127.0.0.1:{port}"
        call.write_bytes(
            pickle.dumps((module, function.__name__, args, device, rank, world_size, store, result, sys.path))
        )
        log = open(folder / f"log-{rank}.txt", "w")
        command = [sys.executable, "-c", _CHILD, str(call)]
        environment = rank_environment(device, rank, world_size, port)
        children.append((subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT), log, result))
    try:
        codes = [child.wait(timeout=TIMEOUT_S) for child, _, _ in children]
    finally:
        for child, log, _ in children:
            child.kill()
            child.wait()
            log.close()
    logs = "\n".join((folder / f"log-{rank}.txt").read_text()[-3000:] for rank in range(world_size))
    assert codes == [0] * world_size, f"exit codes {codes}\n{logs}"
    return [torch.load(result, weights_only=False) for _, _, result in children]


def rank_environment(device: str, rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment of a rank's process: what torchrun sets, and verl's choice of the device."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if device == "cpu":
        environment["VERL_PLATFORM"] = "cpu"
    return environment


def settled_state(engine: Any) -> list[tuple[str, Any]]:
    """``engines.state_of`` on the CPU; copies that are under way, as of an offload, are waited for."""
    import torch
    from engines import state_of

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return [(name, tensor.cpu()) for name, tensor in state_of(engine)]
