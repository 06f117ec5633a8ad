"""One rank of the engine's test: ``python -m verl_fp16.selftest.engine_rank SPEC.json RANK``.

The spec names the ``part``: ``first`` trains with an overflow planted in one update, saves a checkpoint and makes one
update more; ``resumed``, in a fresh process, loads that checkpoint and makes the same one. The facts go to
``PART-RANK.json`` in the spec's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from verl_fp16.selftest.engine_plan import FAULTY, LOSS_SCALE, SAVED, SEQUENCES


def main() -> int:
    spec, rank = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2])
    begin_group(spec, rank)
    facts = PARTS[spec["part"]](spec)
    Path(spec["folder"], f"{spec['part']}-{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def begin_group(spec: dict[str, Any], rank: int) -> None:
    """The process group of all ranks, over NCCL on GPUs and over gloo elsewhere."""
    # A resumed update has to be the same to the bit.
    torch.use_deterministic_algorithms(True, warn_only=True)
    if spec["device"] == "gpu":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    import verl  # noqa: F401  its plugins are loaded

    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if spec["device"] == "gpu" else "cpu:gloo",
        init_method=f"file://{spec['store']}",
        rank=rank,
        world_size=spec["ranks"],
    )
    # torch's own writes the rank before each line, where the line that says why is not found any more.
    sys.excepthook = sys.__excepthook__


def first(spec: dict[str, Any]) -> dict[str, Any]:
    """Train, skip, save, and make one update more."""
    trained = Trained(spec, faults=planted(spec))
    updates = [trained.update() for _ in range(SAVED)]
    trained.engine.save_checkpoint(spec["checkpoint"], global_step=SAVED)
    saved = trained.state()
    return {"updates": updates, "read_back": trained.read_back(), "saved": saved, "next": trained.update()}


def resumed(spec: dict[str, Any]) -> dict[str, Any]:
    """Load what :func:`first` saved, and make one update more."""
    trained = Trained(spec)
    trained.engine.load_checkpoint(spec["checkpoint"])
    return {"loaded": trained.state(), "next": trained.update()}


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"first": first, "resumed": resumed}


def planted(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """An overflow on the last rank, in a gradient that it holds: which those are is seen after one update."""
    from verl_fp16.attribution import named_local_gradients
    from verl_fp16.module_names import name_in_model

    probe, held = Trained(spec), []
    step = probe.engine.optimizer_step

    def remembered_step() -> Any:
        held.extend(name_in_model(name) for name, part in named_local_gradients(probe.engine.module) if part.numel())
        return step()

    probe.engine.optimizer_step = remembered_step
    probe.update()
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, held)
    return [{"target": "gradient", "parameter": of_ranks[-1][0], "rank": len(of_ranks) - 1, "updates": [FAULTY]}]


class Trained:
    """verl's engine on a fixed batch."""

    def __init__(self, spec: dict[str, Any], faults: Sequence[dict[str, Any]] = ()) -> None:
        from verl_fp16 import standalone

        torch.manual_seed(0)
        self._losses: list[float] = []
        self._sequences = spec["sequences"][dist.get_rank() * SEQUENCES :][:SEQUENCES]
        precision = standalone.mixed_precision("float16", loss_scale={"init": LOSS_SCALE}, fault_injection=faults)
        # Attention in plain operations: that of the fused kernels has no order of its sums on a GPU.
        self.engine = standalone.build_engine(
            spec["model"], precision=precision, strategy=spec["strategy"], attention="eager"
        )

    def _loss(self, *args: Any, **kwargs: Any) -> tuple:
        from verl_fp16.standalone import next_token_loss

        loss, metrics = next_token_loss(*args, **kwargs)
        self._losses.append(float(loss))
        return loss, metrics

    def update(self) -> dict[str, Any]:
        """One mini-batch of two micro-batches, and what it left."""
        from verl_fp16 import standalone

        self._losses.clear()
        batch = standalone.make_batch(self._sequences, micro_batch_size=SEQUENCES // 2)
        norm = standalone.train_step(self.engine, batch, loss=self._loss)["grad_norm"]
        self.engine.lr_scheduler_step()
        return {"loss": sum(self._losses), "grad_norm": None if norm is None else float(norm), **self.state()}

    def state(self) -> dict[str, Any]:
        """Digest of this rank's weights and optimizer state, and the scaler's state: None without one of ours."""
        scaler = self.engine.scaler
        known = hasattr(scaler, "growth_tracker")
        return {
            "digest": digest(self.engine.optimizer),
            "skipped": bool(scaler.last_step_skipped) if known else None,
            "scale": None if scaler is None else float(scaler.get_scale()),
            "scaler": scaler.state_dict() if known else None,
        }

    def read_back(self) -> dict[str, Any]:
        """What the live engine computes in."""
        from verl_fp16.readback.rank import report_engine

        found = report_engine(self.engine)
        wanted = ("engine", "fsdp", "autocast", "fsdp_param", "fsdp_reduce", "master", "scaler", "device")
        return {name: found[name] for name in wanted}


def digest(optimizer: torch.optim.Optimizer) -> str:
    """Of every bit of this rank's master weights and optimizer state, step counters too."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in _tensors(optimizer):
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        found.update(local.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            for _, value in sorted(optimizer.state.get(parameter, {}).items()):
                yield value if isinstance(value, torch.Tensor) else torch.tensor(value)


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main())
