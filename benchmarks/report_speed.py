"""What ``verl-fp16 report`` takes on a long log: seconds, CPU seconds and peak memory of a process of its own.

    python benchmarks/report_speed.py [--steps 100000] [--rounds 3] [--out outputs/report-speed.json]

The log has the metrics of a recorded line of verl's file logger, ``recorded_line.json``, with values that wander,
spikes and skipped updates; each line is as long as a real one. The same is measured without orjson, as where no verl is
installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from off_cost import machine_facts, write_result  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RECORDED = Path(__file__).parent / "recorded_line.json"
# As the command does it, without orjson where it is told so: a module that is None cannot be imported.
_CHILD = """
import resource, sys
if sys.argv.pop(1) == "json":
    sys.modules["orjson"] = None
from verl_fp16.cli.app import app
try:
    app()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print("used", used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, file=sys.stderr)
"""


def write_log(path: Path, steps: int, seed: int = 0) -> int:
    """A log of so many steps; its size in bytes."""
    rng = random.Random(seed)
    template = json.loads(RECORDED.read_text())["data"]
    noise = [rng.gauss(0, 0.1) for _ in range(4096)]
    with open(path, "wb") as file:
        for step in range(1, steps + 1):
            offset = step * 131
            data = {
                name: value * (1 + noise[(offset + place) % 4096]) if type(value) is float and value else value
                for place, (name, value) in enumerate(template.items())
            }
            data["critic/score/mean"] = 0.8 - 0.5 * math.exp(-5 * step / steps) + noise[offset % 4096] / 4
            data["actor/loss_scale"] = 2.0 ** (16 - step * 4 // steps)
            data["actor/skipped_steps"] = float(step % (steps // 4 + 1) == 0)
            data["actor/skipped_total"] = float(step // (steps // 4 + 1))
            if step % 50 == 0:
                data["val-core/sums/acc/mean@1"] = 0.8 - 0.4 * math.exp(-5 * step / steps)
            if step % 9973 == 0:
                data["actor/grad_norm"] = 1e4
            file.write(json.dumps({"step": step, "data": data}, separators=(",", ":")).encode() + b"\n")
    return path.stat().st_size


def run(log: Path, folder: Path, parser: str) -> dict[str, float]:
    """Seconds, CPU seconds and peak resident bytes of one report."""
    command = [sys.executable, "-c", _CHILD, parser, "report", str(log), "-o", str(folder)]
    started = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"the report failed:\n{done.stderr[-4000:]}")
    cpu, peak = done.stderr.rpartition("used ")[2].split()
    return {"seconds": seconds, "cpu_seconds": float(cpu), "peak_bytes": int(peak)}


def measure(steps: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "long.jsonl"
        size = write_log(log, steps)
        result: dict[str, Any] = {"steps": steps, "log_bytes": size}
        for parser in ("orjson", "json"):
            runs = [run(log, Path(folder) / "report", parser) for _ in range(rounds)]
            result[parser] = {
                "seconds": statistics.median(one["seconds"] for one in runs),
                "cpu_seconds": statistics.median(one["cpu_seconds"] for one in runs),
                "all_seconds": [one["seconds"] for one in runs],
                "peak_bytes": max(one["peak_bytes"] for one in runs),
            }
        result["page_bytes"] = (Path(folder) / "report" / "report.html").stat().st_size
    return result


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"verl-fp16 report, {result['steps']:,} steps, {result['log_bytes'] / 1e6:,.0f} MB; {result['machine']}"
    table = Table(title=title, title_justify="left")
    for column in ("read with", "seconds", "CPU seconds", "peak memory, MB"):
        table.add_column(column, justify="right")
    for parser in ("orjson", "json"):
        row = result[parser]
        table.add_row(parser, f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}")
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("outputs") / "report-speed.json")
    parser.add_argument("--log", type=Path, help="only write a log of --steps there, and measure nothing")
    options = parser.parse_args()
    if options.log:
        print(f"{options.log}: {write_log(options.log, options.steps):,} bytes")
        return
    result = {**machine_facts(), "load_before": os.getloadavg()[0], **measure(options.steps, options.rounds)}
    print_table(result)
    write_result(result, options.out)


if __name__ == "__main__":
    main()
