"""What the loss scaler costs on a step without a skip, against the one that verl uses: ``ShardedGradScaler``.

    python benchmarks/scaler_cost.py [--rounds 60] [--out outputs/scaler-cost.json]

One of verl's FSDP2 engines in FP16, four micro-batches an update; its scaler is swapped from round to round, so that
both sides meet the same weights and the same neighbours on the machine. verl's own scaler disables itself on a CPU; it
is given the device here. Both sides skip nothing. The seconds are of CPU time; ratios are compared as in
``off_cost.py``.

Counted, for one update on each side: operations that torch dispatches, without views, and reads from the device; the
reads also as torch's profiler records them. On a CPU torch's scaler updates its scale in Python, with a read of its own
that it does not make on a GPU: left out of both.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

from off_cost import STEPS_IN_A_ROUND, machine_facts, make_model, run_steps, summary, write_result  # noqa: E402

OURS, NATIVE = "LossScaler", "ShardedGradScaler"
_READ = "_local_scalar_dense"


class Sides:
    """An engine with either scaler.

    Args:
        engine: an FSDP engine of verl's in FP16, with the hooks in place and the flag given.
        device: the native scaler's.
    """

    def __init__(self, engine: Any, device: str) -> None:
        import torch.distributed as dist
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        native = ShardedGradScaler(device=device, growth_interval=400, process_group=dist.group.WORLD)
        self._engine = engine
        self._scalers = {OURS: (engine.scaler, engine._verl_fp16_watch), NATIVE: (native, None)}

    def use(self, side: str) -> None:
        """Have the next updates made with the scaler of ``side``: without the watch no hook of ours acts."""
        self._engine.scaler, self._engine._verl_fp16_watch = self._scalers[side]


def make_batch() -> Any:
    from verl_fp16 import standalone

    return standalone.make_batch([list(range(start, start + 32)) for start in range(8)], micro_batch_size=2)


def make_sides(model: Path, device: str) -> tuple[Any, Sides]:
    from verl_fp16 import standalone

    engine = standalone.build_engine(str(model), precision=standalone.mixed_precision("float16"))
    return engine, Sides(engine, device)


def count_operations(engine: Any, sides: Sides) -> dict[str, dict[str, int]]:
    """For each side: operations of one update, and among them and beside them the reads from the device."""
    from verl_fp16 import standalone

    counts = {}
    for side in (NATIVE, OURS):
        sides.use(side)
        standalone.train_step(engine, make_batch())  # whatever is made at the first use
        with counted_operations() as operations:
            standalone.train_step(engine, make_batch())
        reads = operations[_READ] + operations["tolist"]
        counts[side] = {
            "operations": sum(operations.values()),
            "reads": reads,
            "reads_profiled": profiled_reads(engine),
        }
    return counts


def profiled_reads(engine: Any) -> int:
    """Reads from the device in one update, as torch's profiler records them; ``tolist`` is added, which it does not."""
    import torch
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    from verl_fp16 import standalone

    lists: list[torch.Tensor] = []
    original = torch.Tensor.tolist
    with (
        mock.patch.object(torch.Tensor, "tolist", lambda tensor: (lists.append(tensor), original(tensor))[1]),
        mock.patch.object(ShardedGradScaler, "_amp_update_scale_cpu_", lambda scaler, found_inf: None),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        standalone.train_step(engine, make_batch())
    return len(lists) + sum(event.name == f"aten::{_READ}" for event in profile.events())


@contextmanager
def counted_operations() -> Iterator[Counter]:
    """Counts what torch dispatches, by name, and ``tolist``, which on a CPU does not pass the dispatcher."""
    import torch
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            # A view starts no kernel.
            operations[function.overloadpacket.__name__] += not paused and not function.is_view
            return function(*args, **(kwargs or {}))

    def tolist(tensor: torch.Tensor) -> Any:
        operations["tolist"] += 1
        return original(tensor)

    def as_on_a_gpu(scaler: Any, found_inf: torch.Tensor) -> None:
        paused.append(True)
        update(scaler, found_inf)
        paused.clear()
        operations["_amp_update_scale_"] += 1

    operations: Counter = Counter()
    paused: list[bool] = []
    original, update = torch.Tensor.tolist, ShardedGradScaler._amp_update_scale_cpu_
    with (
        Count(),
        mock.patch.object(torch.Tensor, "tolist", tolist),
        mock.patch.object(ShardedGradScaler, "_amp_update_scale_cpu_", as_on_a_gpu),
    ):
        yield operations


def measure_steps(rounds: int, out: Path) -> None:
    """Write the counts, and (native, ours) CPU seconds a step for each round, of one engine on gloo with one rank."""
    import torch
    import torch.distributed as dist
    import verl  # noqa: F401

    from verl_fp16 import standalone

    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo", init_method=f"file://{out}.store", rank=0, world_size=1)
    engine, sides = make_sides(make_model(out.parent / "model"), "cpu")
    counts = count_operations(engine, sides)
    batch = make_batch()
    seconds = []
    for index in range(rounds):
        by_side = {}
        for side in (NATIVE, OURS) if index % 2 == 0 else (OURS, NATIVE):
            sides.use(side)
            start = time.process_time()
            for _ in range(STEPS_IN_A_ROUND):
                standalone.train_step(engine, batch)
            by_side[side] = (time.process_time() - start) / STEPS_IN_A_ROUND
        seconds.append((by_side[NATIVE], by_side[OURS]))
    out.write_text(json.dumps({"counts": counts, "seconds": seconds}))
    dist.destroy_process_group()


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"one update without a skip; {result['machine']}, {result['date']}")
    for column in ("scaler", "operations", "reads from the device", "CPU ms"):
        table.add_column(column)
    row = result["update"]
    for side, seconds in ((NATIVE, row["without_cpu_seconds"]), (OURS, row["with_cpu_seconds"])):
        counts = result["counts"][side]
        table.add_row(side, str(counts["operations"]), str(counts["reads"]), f"{seconds * 1e3:.2f}")
    Console(width=110).print(table)
    low, high = row["ratio_quartiles"]
    print(
        f"ratio {row['ratio']:.4f} [{low:.4f}, {high:.4f}], of noise {row['ratio_of_noise']:.4f}, {row['pairs']} pairs"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="pairs of rounds of updates")
    parser.add_argument("--out", type=Path, default=Path("outputs") / "scaler-cost.json")
    parser.add_argument("--steps-into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 4:
        parser.error("--rounds must be at least 4, for quartiles and for the ratio of noise")
    if options.steps_into:
        measure_steps(options.rounds, options.steps_into)
        return
    measured = run_steps(options.rounds, __file__)
    result = {**machine_facts(), "counts": measured["counts"], "update": summary(measured["seconds"])}
    print_table(result)
    write_result(result, options.out)


if __name__ == "__main__":
    main()
