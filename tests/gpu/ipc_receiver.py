"""The other process of a weight sync: takes buckets by CUDA IPC into float16 tensors, and tells what arrived.

Used as a script: ``python ipc_receiver.py DEVICE HANDLE TARGETS OUT``. TARGETS is a file with name -> shape. For each
line on stdin it receives one sync and writes what it holds and its report to ``OUT-<n>.pt``; then it says DONE.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def load(held: dict[str, torch.Tensor], weights: list[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in weights:
        held[name].data.copy_(tensor)


def receive(device: str, handle: str, held: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One sync: what :meth:`WeightReceiver.report` says of it, and where and in which dtypes the buckets arrived."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

    from verl_fp16.weight_sync.receiver import WeightReceiver

    watcher = WeightReceiver(lambda: held.items())
    buckets: list[int] = []
    arrived: set[tuple[str, torch.dtype]] = set()

    def on_bucket(weights: list[tuple[str, torch.Tensor]], is_last: bool) -> None:
        buckets.append(len(weights))
        arrived.update((tensor.device.type, tensor.dtype) for _, tensor in weights)
        watcher.load(weights, lambda: load(held, weights))

    there = torch.device("cpu") if device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    receiver = BucketedWeightReceiver(handle, there, use_shm=device == "cpu")
    receiver.receive_weights(on_bucket)
    return {"report": watcher.report(torch.float16), "buckets": buckets, "arrived": arrived}


def main(device: str, handle: str, targets: str, out: str) -> None:
    import verl  # noqa: F401  its plugins choose the device

    shapes = torch.load(targets, weights_only=False)
    held = {
        name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float16, device=device), requires_grad=False)
        for name, shape in shapes.items()
    }
    print("READY", flush=True)
    for number, _ in enumerate(sys.stdin):
        found = receive(device, handle, held)
        if device != "cpu":
            torch.cuda.synchronize()
        torch.save({**found, "held": {name: tensor.cpu() for name, tensor in held.items()}}, f"{out}-{number}.pt")
        print("DONE", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
