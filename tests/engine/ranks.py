"""Runs a function on several ranks over gloo, each in a fresh process in which verl chose the CPU."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from releases import RELEASES, release_environment, version_of

_CHILD = """
import pickle, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
import verl
assert verl.__version__ == {release!r}, verl.__file__
assert {{"verl_fp16.plugin", "verl_fp16.cpu.plugin"}} <= sys.modules.keys(), "verl loads the plugins"
sys.path.extend({path!r})
module, name, args, rank, world, store, result = pickle.load(open(sys.argv[1], "rb"))
dist.init_process_group("cpu:gloo", init_method=store, rank=rank, world_size=world)
function = getattr(__import__(module), name)
value = function(*args)
with open(result, "wb") as file:
    torch.save(value, file)
dist.barrier()
dist.destroy_process_group()
"""


def on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    folder: Path,
    release: str = RELEASES[-1],
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks and return what each rank returned, in the order of ranks.

    Args:
        function: a function of a test module (found by name in the child processes).
        folder: for the files of this call.
        release: the verl that the ranks run.

    Raises:
        AssertionError: a rank failed; with its output.
    """
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world_size):
        call, result = folder / f"call-{rank}.pkl", folder / f"result-{rank}.pt"
        store = f"tcp://127.0.0.1:{port}"
        call.write_bytes(
            pickle.dumps((function.__module__.split(".")[-1], function.__name__, args, rank, world_size, store, result))
        )
        environment = {
            **os.environ,
            **release_environment(release),
            "VERL_PLATFORM": "cpu",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **(env or {}),
        }
        log = open(folder / f"log-{rank}.txt", "w")
        command = [sys.executable, "-c", _CHILD.format(path=sys.path, release=version_of(release)), str(call)]
        children.append((subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT), log, result))
    try:
        codes = [child.wait(timeout=400) for child, _, _ in children]
    finally:
        for child, log, _ in children:
            child.kill()
            child.wait()
            log.close()
    logs = "\n".join((folder / f"log-{rank}.txt").read_text()[-3000:] for rank in range(world_size))
    assert codes == [0] * world_size, f"exit codes {codes}\n{logs}"
    return [torch.load(result, weights_only=False) for _, _, result in children]
