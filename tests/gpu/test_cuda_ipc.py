"""The weight sync between two processes on one GPU, by CUDA IPC: FP32 masters arrive as the same FP16."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from gpu_ranks import needs, on_devices

pytestmark = needs("verl", "transformers", "zmq")

WHOLE, SEVERAL, LARGE = 2 << 20, 128 << 10, 32 << 10


class _Receiver:
    """The process of ``ipc_receiver.py``."""

    def __init__(self, device: str, handle: str, targets: Path, out: Path) -> None:
        script = Path(__file__).with_name("ipc_receiver.py")
        command = [sys.executable, str(script), device, handle, str(targets), str(out)]
        self._out, self._number = out, 0
        self._log = open(out.with_suffix(".log"), "w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env={**os.environ}
        )
        self._wait("READY")

    def ask(self) -> None:
        print("receive", file=self._process.stdin, flush=True)

    def answer(self) -> dict:
        self._wait("DONE")
        self._number += 1
        return torch.load(f"{self._out}-{self._number - 1}.pt", weights_only=False)

    def _wait(self, word: str) -> None:
        for line in self._process.stdout:
            if line.startswith(word):
                return
        self._log.flush()
        told = Path(self._log.name).read_text()[-2000:]
        raise AssertionError(f"the receiver ended with exit code {self._process.wait()}\n{told}")

    def close(self) -> int:
        self._process.stdin.close()
        code = self._process.wait(timeout=60)
        self._log.close()
        return code


def synced(model: str, device: str, strategy: str, bucket: int, folder: str) -> dict:
    """Two audited syncs: everything as it is, and what may go in float16 in float16; weights changed in between."""
    from test_weight_sync import build, state_of

    from verl_fp16.weight_sync import audit
    from verl_fp16.weight_sync.rank_calls import sender_of
    from verl_fp16.weight_sync.sender import Learned

    engine = build(model, strategy, True)
    targets = Path(folder) / "targets.pt"
    torch.save({name: tensor.shape for name, tensor in state_of(engine).items()}, targets)
    sender, results = sender_of(engine), []
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 107 characters at most
        handle = f"ipc://{short}/weights.sock"
        receiver = _Receiver(device, handle, targets, Path(folder) / "received")
        for number in (1, 2):
            sender.prepare(digests=True)
            receiver.ask()
            _send(engine, handle, bucket, device)
            received = receiver.answer()
            sent = sender.report()
            both = [("rank 0", sent)], [("receiver", received["report"])]
            faults = [*audit.stream_faults(*both), *audit.holding_faults(both[1]), *audit.unchecked(both[1])]
            masters = {name: tensor.cpu() for name, tensor in state_of(engine).items()}
            results.append({**received, "faults": faults, "bytes": sent["bytes"], "masters": masters})
            if number == 1:
                sender.learn(Learned(*(frozenset(names) for names in audit.learned(both[1]).values())))
                _change(engine)
        results.append(receiver.close())
    return {"first": results[0], "second": results[1], "exit code": results[2]}


def _send(engine, handle: str, bucket: int, device: str) -> None:
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    weights, _ = engine.get_per_tensor_param()
    transfer = BucketedWeightSender(handle, 1, use_shm=device == "cpu")
    transfer.bucket_size = bucket  # less than a megabyte is not to be had by its argument
    asyncio.run(transfer.async_send_weights(weights))


@torch.no_grad()
def _change(engine) -> None:
    for parameter in engine.module.parameters():
        (parameter.to_local() if hasattr(parameter, "to_local") else parameter).mul_(1.01)


@pytest.fixture(scope="module", params=[("fsdp2", WHOLE), ("fsdp", SEVERAL), ("fsdp2", LARGE)], ids=str)
def run(request, tiny_model, device, tmp_path_factory) -> dict:
    strategy, bucket = request.param
    if bucket == LARGE and device == "cpu":
        pytest.skip("verl sends no tensor that is larger than a bucket through shared memory")
    folder = tmp_path_factory.mktemp("sync")
    arguments = (str(tiny_model), device, strategy, bucket, str(folder))
    (found,) = on_devices(1, synced, *arguments, folder=folder, device=device)
    return {**found, "bucket": bucket}


@pytest.mark.parametrize("which", ("first", "second"))
def test_what_is_held_is_the_master_in_float16(run, which):
    seen = run[which]
    assert seen["held"].keys() == seen["masters"].keys() and len(seen["held"]) > 10
    for name, master in seen["masters"].items():
        assert torch.equal(seen["held"][name].view(torch.int16), master.to(torch.float16).view(torch.int16)), name
    before, after = run["first"]["held"], run["second"]["held"]
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"]), "the second brought others"
    assert run["exit code"] == 0


@pytest.mark.parametrize("which", ("first", "second"))
def test_the_audit_finds_what_was_sent(run, which):
    """The digests of both sides, each computed on its own device, are equal, and so is what is held."""
    assert run[which]["faults"] == []
    assert len(run[which]["report"]["stream"]) == len(run[which]["masters"])


def test_it_went_through_the_gpu_in_half_of_the_bytes(run, device):
    values = sum(tensor.numel() for tensor in run["first"]["masters"].values())
    assert run["first"]["arrived"] == {(device, torch.float32)} and run["first"]["bytes"] == 4 * values
    assert run["second"]["arrived"] == {(device, torch.float16)} and run["second"]["bytes"] == 2 * values
    counts = run["first"]["buckets"]
    assert sum(counts) == len(run["first"]["masters"])
    assert (len(counts) == 1) == (run["bucket"] == WHOLE)
