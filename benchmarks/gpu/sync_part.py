"""A weight sync from verl's FSDP2 engine into vLLM: FP16 with our checks against verl's own float32.

As ``benchmarks/weight_sync.py``, through verl's sender and worker extension; on a GPU by CUDA IPC.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from measure import Memory, Settings, alternated, durations, join_group_of_one

PLAIN, OURS = "float32, plain verl", "float16"
# A sync takes seconds.
SYNC_LIMIT_S = 600
_HANDLE = "ipc:///tmp/rl-colocate-zmq-{job}-replica-0-rank-0.sock"


def while_it_runs(process: subprocess.Popen, work: Callable[[], Any]) -> Any:
    """What ``work`` returns or raises, which waits for ``process`` without a limit of its own.

    Raises:
        RuntimeError: the process ended before, or it takes longer than :data:`SYNC_LIMIT_S`; the thread that does the
            work then ends with this process.
    """
    pool = ThreadPool(1)  # of a daemon thread, which keeps nobody from ending
    result = pool.apply_async(work)
    pool.close()
    end = time.monotonic() + SYNC_LIMIT_S
    while not result.ready():
        result.wait(0.2)
        if not result.ready() and process.poll() is not None:
            raise RuntimeError(f"vLLM ended with exit code {process.returncode} while weights were sent")
        if not result.ready() and time.monotonic() > end:
            raise RuntimeError(f"a weight sync took longer than {SYNC_LIMIT_S} s")
    return result.get()


class Receiver:
    """The process of ``sync_receiver.py``."""

    def __init__(self, model: str, device: str, job: str) -> None:
        script = Path(__file__).with_name("sync_receiver.py")
        env = {**os.environ, "VERL_RAY_JOB_ID": job, "VERL_REPLICA_RANK": "0"}
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(script), model, device],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._wait("READY")

    def while_it_receives(self, work: Callable[[], Any]) -> Any:
        """As :func:`while_it_runs`."""
        return while_it_runs(self._process, work)

    def ask(self, method: str, *arguments: str) -> None:
        print(json.dumps([method, *arguments]), file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        return json.loads(self._wait("DONE"))

    def _wait(self, word: str) -> str:
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        code = self._process.wait()
        self._log.seek(0)
        told = [line.strip() for line in self._log if line.strip()]
        raise RuntimeError(f"vLLM ended with exit code {code}: {told[-1][:300] if told else 'it said nothing'}")

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def sync(settings: Settings) -> dict[str, Any]:
    """Seconds and bytes of a sync, and the sender's most memory above its engine; the first one is audited."""
    from verl_fp16 import standalone
    from verl_fp16.weight_sync.rank_calls import sender_of

    job = f"benchmark{os.getpid()}"
    join_group_of_one(settings.device)
    receiver = Receiver(settings.model, settings.device, job)
    try:
        engines = {
            PLAIN: standalone.build_engine(settings.model, precision={"param_dtype": "fp16"}),
            OURS: standalone.build_engine(settings.model, precision=standalone.mixed_precision("float16")),
        }
        ours = sender_of(engines[OURS])
        _audited(engines[OURS], ours, receiver, settings, job)
        sent: dict[str, int] = {}

        def once(name: str) -> None:
            ours.prepare(digests=False)
            sent[name] = _send(engines[name], receiver, settings, job)
            if name == OURS:
                ours.report()

        sides = {name: lambda _, name=name: once(name) for name in engines}
        memory, peaks = Memory(settings.device), {}
        for name in engines:
            once(name)
            before = memory.now()
            peaks[name] = max(0, memory.peak_of(lambda name=name: once(name)) - before)
        found = durations(alternated(sides, settings), PLAIN)
    finally:
        receiver.close()
    for name, side in found["sides"].items():
        side |= {"peak_bytes": peaks[name], "bytes": sent[name]}
    return found | {"transport": "shared memory" if settings.device == "cpu" else "CUDA IPC"}


def _send(engine: Any, receiver: Receiver, settings: Settings, job: str) -> int:
    """One sync; the bytes that it sent."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    total = 0

    def counted(weights: Any) -> Any:
        nonlocal total
        for name, tensor in weights:
            total += tensor.nbytes
            yield name, tensor

    receiver.ask("update_weights_from_ipc")
    weights, _ = engine.get_per_tensor_param()
    transfer = BucketedWeightSender(_HANDLE.format(job=job), 2048, use_shm=settings.device == "cpu")
    receiver.while_it_receives(lambda: asyncio.run(transfer.async_send_weights(counted(weights))))
    receiver.answer()
    return total


def _audited(engine: Any, sender: Any, receiver: Receiver, settings: Settings, job: str) -> None:
    """The first sync: everything as it is. What the rollout says of it decides what goes in float16 from then on.

    Raises:
        RuntimeError: what arrived, or is held, is not what was sent.
    """
    from verl_fp16.weight_sync import audit
    from verl_fp16.weight_sync.sender import Learned

    sender.prepare(digests=True)
    receiver.ask("verl_fp16_begin_audit")
    receiver.answer()
    _send(engine, receiver, settings, job)
    receiver.ask("verl_fp16_end_audit", "float16")
    received = [("worker", receiver.answer())]
    faults = [*audit.stream_faults([("rank 0", sender.report())], received), *audit.holding_faults(received)]
    if faults:
        raise RuntimeError(f"the audit found: {'; '.join(faults)}")
    sender.learn(Learned(*(frozenset(names) for names in audit.learned(received).values())))
