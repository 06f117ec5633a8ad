"""Collect the summaries of quickstart runs into ``benchmarks/results/quickstart-cpu.json``, for the README's table.

python benchmarks/collect_quickstart.py outputs/quickstart-seed1/summary.json ...
"""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

OUT = Path(__file__).parent / "results" / "quickstart-cpu.json"


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    runs = [json.loads(Path(path).read_text()) for path in paths]
    broken = [path for path, run in zip(paths, runs, strict=True) if not run["completed"]]
    if broken:
        print(f"these runs did not end well: {', '.join(broken)}", file=sys.stderr)
        return 1
    for run in runs:
        del run["overrides"]  # paths of the machine
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    result = {"date": date.today().isoformat(), "machine": machine, "runs": runs}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
