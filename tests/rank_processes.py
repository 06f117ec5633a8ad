"""Calls a function of a test module on several ranks, each in a fresh process. Imports neither torch nor verl."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHILD = """
import pickle, sys
call = pickle.load(open(sys.argv[1], "rb"))
sys.path.extend(call["path"])
import torch, torch.distributed as dist
if call["device"] == "cuda":
    torch.cuda.set_device(call["rank"])
else:
    torch.set_num_threads(1)
import verl
exec(call["check"])
backend = "cpu:gloo,cuda:nccl" if call["device"] == "cuda" else "cpu:gloo"
dist.init_process_group(backend, init_method=call["store"], rank=call["rank"], world_size=call["world_size"])
value = getattr(__import__(call["module"]), call["name"])(*call["args"])
with open(call["result"], "wb") as file:
    torch.save(value, file)
dist.barrier()
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class RankProcesses:
    """What the processes of all ranks have in common.

    Args:
        device: cuda (NCCL, a GPU for each rank) or cpu (gloo, one thread each).
        check: statements that a rank runs when verl is imported.
        environment: beside this process's own and what torchrun sets.
        timeout_s: the longest that a rank may take, in seconds.
    """

    device: str
    check: str
    environment: Mapping[str, str]
    timeout_s: float

    def call(self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> list[Any]:
        """What ``function(*args)`` returned on each rank, in the order of ranks.

        Args:
            function: a function of a test module (found by name in the processes).
            folder: for the files of this call.

        Raises:
            AssertionError: a rank failed; with its output.
        """
        import torch

        port = _free_port()
        call = {
            "module": function.__module__.split(".")[-1],
            "name": function.__name__,
            "args": args,
            "path": sys.path,
            "device": self.device,
            "check": self.check,
            "world_size": world_size,
            "store": f"tcp://127.0.0.1:{port}",
        }
        children = []
        for rank in range(world_size):
            file, result = folder / f"call-{rank}.pkl", folder / f"result-{rank}.pt"
            file.write_bytes(pickle.dumps({**call, "rank": rank, "result": result}))
            log = open(folder / f"log-{rank}.txt", "w")
            process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(file)],
                env={**os.environ, **_torchrun(rank, world_size, port), **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            children.append((process, log, result))
        try:
            codes = [process.wait(timeout=self.timeout_s) for process, _, _ in children]
        finally:
            for process, log, _ in children:
                process.kill()
                process.wait()
                log.close()
        logs = "\n".join((folder / f"log-{rank}.txt").read_text()[-3000:] for rank in range(world_size))
        assert codes == [0] * world_size, f"exit codes {codes}\n{logs}"
        return [torch.load(result, weights_only=False) for _, _, result in children]


def _torchrun(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
