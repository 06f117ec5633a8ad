"""What counting costs when weights are cast to float16: ``CheckedCast`` against ``tensor.to(torch.float16)`` alone.

    python benchmarks/weight_cast.py [--pairs 21] [--out outputs/weight-cast.json]

float32 values drawn like weights (normal, 0.02). Both sides are timed by the wall clock, in turns, which of them goes
first is swapped from pair to pair, and what is compared is the median of the pairs' ratios with its quartiles. Of
neighbours that are both casts alone, the same median says how much of it is noise.

With several threads, every operation of torch's waits for all of them: on cores that others use too, that takes longer
than the arithmetic, and longer still where there are more operations. ``load_before`` in the result tells.

Each size is measured three times, in processes of their own, since memory decides what a cast costs:

* ``sync``: one image after the other, each let go before the next, with the C library as it is. For ``to`` that is the
  memory of the last one up to 32 MiB, and new pages from the kernel beyond; ``CheckedCast`` always uses its own again.
* ``new``: both images in new pages, which is what a process pays for each image that it keeps, as an export does.
* ``reused``: both in memory that the process had before; what is left is arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from off_cost import machine_facts, write_result  # noqa: E402

SIZES = tuple(2**20 * millions for millions in (1, 3, 10, 30, 100))
STD = 0.02
MEMORY = {
    "sync": {},
    # glibc: below the first, memory comes from the heap; above the second, what is free goes back to the kernel.
    "new": {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)},
    "reused": {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)},
}


def measure(memory: str, threads: int, pairs: int) -> list[dict[str, Any]]:
    """A row for each size: medians of both sides in seconds, their ratio with quartiles, and that of noise."""
    import torch

    from verl_fp16.weight_cast import CheckedCast

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    rows = []
    for size in SIZES:
        weights = torch.randn(size) * STD
        again = CheckedCast()
        plain = _timed(lambda weights=weights: weights.to(torch.float16))
        checked = CheckedCast if memory == "new" else lambda again=again: again
        counted = _timed(lambda weights=weights, checked=checked: checked()("w", weights))
        plain(), counted()
        times = []
        for index in range(pairs):
            first, second = (plain, counted) if index % 2 == 0 else (counted, plain)
            one, other = first(), second()
            times.append((one, other) if index % 2 == 0 else (other, one))
        rows.append({"size": size, "threads": threads, **summary(times)})
    return rows


def _timed(run: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - start
        del result
        return elapsed

    return seconds


def summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [counted / plain for plain, counted in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    plains = [plain for plain, _ in times]
    return {
        "pairs": len(times),
        "to_seconds": statistics.median(plains),
        "checked_seconds": statistics.median(counted for _, counted in times),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [low, high],
        "ratio_of_noise": statistics.median(b / a for a, b in zip(plains[::2], plains[1::2], strict=False)),
    }


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"float32 to float16; {result['machine']} ({result['processor']}), {result['date']}")
    for column in ("values", "threads", "memory", "to, ms", "CheckedCast, ms", "ratio [quartiles]", "noise"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        table.add_row(
            f"{row['size']:,}",
            str(row["threads"]),
            row["memory"],
            f"{row['to_seconds'] * 1e3:.2f}",
            f"{row['checked_seconds'] * 1e3:.2f}",
            f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]",
            f"{row['ratio_of_noise']:.2f}",
        )
    Console(width=110).print(table)


def processor() -> str:
    """The name that the kernel has for it."""
    names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else "unknown"


def run_child(memory: str, threads: int, pairs: int) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--child", memory, "--threads", str(threads), "--pairs", str(pairs)]
    done = subprocess.run(command, env={**os.environ, **MEMORY[memory]}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the measurement failed:\n{done.stderr[-4000:]}")
    return [{"memory": memory, **row} for row in json.loads(done.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=21, help="pairs of casts for each size")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs") / "weight-cast.json")
    parser.add_argument("--child", choices=MEMORY, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pairs < 4:
        parser.error("--pairs must be at least 4, for quartiles and for the ratio of noise")
    if options.child:
        print(json.dumps(measure(options.child, options.threads[0], options.pairs)))
        return
    load = os.getloadavg()[0]
    rows = [
        row for memory in MEMORY for threads in options.threads for row in run_child(memory, threads, options.pairs)
    ]
    result = {**machine_facts(), "processor": processor(), "load_before": load, "std": STD, "rows": rows}
    print_table(result)
    write_result(result, options.out)


if __name__ == "__main__":
    main()
