"""verl's FSDP engine in FP16 on all ranks: it learns, skips an overflow, and goes on from a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from verl_fp16.quickstart.task import split_sums
from verl_fp16.run_log import telling_lines
from verl_fp16.selftest.engine_plan import SEQUENCES, STRATEGIES

PARTS = ("first", "resumed")
RANK_TIMEOUT_S = 180.0
"""Of each part of each strategy."""


class RankFailed(RuntimeError):
    """A rank ended otherwise than by itself; the message says how and why."""


def run(spec: dict[str, Any], tell: Callable[[str], object]) -> dict[str, Any]:
    """Facts by strategy: ``ranks``, ``seconds``, and what each rank found in each part; or ``failed``, why not.

    Args:
        spec: ``model`` (folder of the small model), ``device`` (gpu or cpu), ``gpus`` (ranks) and ``output``; and
            ``strategies``, where not both are wanted.
        tell: is told what is under way.
    """
    return {strategy: _strategy(spec, strategy, tell) for strategy in spec.get("strategies", STRATEGIES)}


def _strategy(spec: dict[str, Any], strategy: str, tell: Callable[[str], object]) -> dict[str, Any]:
    began = time.monotonic()
    facts: dict[str, Any] = {"device": spec["device"], "ranks": spec["gpus"]}
    with tempfile.TemporaryDirectory(prefix="engine-", dir=spec["output"]) as folder:
        common = {
            "model": spec["model"],
            "device": spec["device"],
            "ranks": spec["gpus"],
            "strategy": strategy,
            "folder": folder,
            "checkpoint": f"{folder}/checkpoint",
            "sequences": sequences(spec["gpus"]),
        }
        try:
            for part in PARTS:
                tell(f"{strategy}, {'training' if part == 'first' else 'resuming'}")
                facts[part] = on_ranks({**common, "part": part, "store": f"{folder}/store-{part}"}, spec["output"])
        except RankFailed as error:
            facts["failed"] = str(error)
    return {**facts, "seconds": time.monotonic() - began}


def sequences(ranks: int) -> list[list[int]]:
    """Sums with their answers as tokens of the small model, different ones for each rank."""
    texts = [f"{one.question}{one.answer}" for one in split_sums(0).train[: ranks * SEQUENCES]]
    return [list(text.encode()) for text in texts]


def on_ranks(spec: dict[str, Any], output: str) -> list[dict[str, Any]]:
    """What each rank found.

    Raises:
        RankFailed: one of them failed, or they took too long; all have been ended.
    """
    folder = Path(spec["folder"])
    file = folder / f"{spec['part']}.json"
    file.write_text(json.dumps(spec))
    logs = [Path(output, f"engine-{spec['strategy']}-{spec['part']}-{rank}.log") for rank in range(spec["ranks"])]
    children = [_start(file, rank, spec["ranks"], log) for rank, log in enumerate(logs)]
    try:
        _wait(children, logs)
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [json.loads((folder / f"{spec['part']}-{rank}.json").read_text()) for rank in range(spec["ranks"])]


def _start(file: Path, rank: int, ranks: int, log: Path) -> subprocess.Popen[bytes]:
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    with open(log, "wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "verl_fp16.selftest.engine_rank", str(file), str(rank)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def _wait(children: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    """Until all have ended well; a rank whose neighbour has failed would wait for it for ever."""
    deadline = time.monotonic() + RANK_TIMEOUT_S
    while any(child.poll() is None for child in children):
        if (bad := _failed(children)) is not None:
            break
        if time.monotonic() > deadline:
            late = next(rank for rank, child in enumerate(children) if child.returncode is None)
            raise RankFailed(f"rank {late} took longer than {RANK_TIMEOUT_S:.0f} s ({logs[late].name})")
        time.sleep(0.1)
    if (bad := _failed(children)) is not None:
        lines = telling_lines(logs[bad], 2)
        why = lines[-1] if lines else "it said nothing"
        raise RankFailed(f"rank {bad} ended with code {children[bad].returncode} ({logs[bad].name}): {why}")


def _failed(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    return next((rank for rank, child in enumerate(children) if child.poll()), None)
