"""What the tests on a GPU gave, from pytest's own report.

    python -m pytest tests/gpu --junitxml=report.xml
    python benchmarks/gpu/collect_tests.py report.xml [--output FILE]

Written to benchmarks/results/gpu-tests-<name of the GPU>.json: for each file how many tests passed, failed and were
skipped, which failed, and why some were skipped. Run it where the tests ran: the GPU's name is this machine's.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent)]

from facts import device_name, driver_version, slug, versions  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


class WrongInput(Exception):
    """One line that names the thing and the fix."""


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """Test file -> passed, failed, skipped (counts), seconds, ``failures`` (tests) and ``skips`` (reasons).

    Raises:
        WrongInput: no report of pytest's, or one without tests.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise WrongInput(f"{path} cannot be read: {error.strerror or error}") from None
    except ElementTree.ParseError as error:
        raise WrongInput(f"{path} is no report: {error}; make one with pytest --junitxml={path}") from None
    files: dict[str, dict[str, Any]] = {}
    for case in root.iter("testcase"):
        file = _file_of(case)
        row = files.setdefault(
            file, {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": [], "skips": []}
        )
        row["seconds"] = round(row["seconds"] + float(case.get("time", 0)), 2)
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            row["failed"] += 1
            row["failures"].append(case.get("name"))
        elif skip is not None:
            row["skipped"] += 1
            reason = skip.get("message") or "no reason told"
            row["skips"] += [reason] if reason not in row["skips"] else []
        else:
            row["passed"] += 1
    if not files:
        raise WrongInput(f"{path} has no tests: make it with pytest --junitxml={path}")
    return dict(sorted(files.items()))


def _file_of(case: ElementTree.Element) -> str:
    """From pytest's ``tests.gpu.test_x`` (with a class, where there is one); a file that cannot be imported: itself."""
    parts = (case.get("classname") or case.get("name") or "unknown").split(".")
    last = max((n for n, part in enumerate(parts) if part.startswith("test_")), default=len(parts) - 1)
    return "/".join(parts[: last + 1]) + ".py"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what pytest --junitxml wrote")
    parser.add_argument("--output", type=Path, help="the result's file")
    options = parser.parse_args(arguments)
    import torch

    try:
        files = read_report(options.report)
        if not torch.cuda.is_available():
            raise WrongInput("torch sees no GPU here: collect the report on the machine where the tests ran")
    except WrongInput as error:
        print(f"collect_tests.py: {error}", file=sys.stderr)
        return 2
    gpu = device_name("cuda")
    output = options.output or RESULTS / f"gpu-tests-{slug(gpu)}.json"
    head = {"gpu": gpu, "driver": driver_version(), "date": date.today().isoformat(), "versions": versions()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**head, "files": files}, indent=2) + "\n")
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
