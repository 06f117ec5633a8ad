"""What the tests on a GPU gave, from pytest's own report.

    python -m pytest tests/gpu --junitxml=report.xml
    python benchmarks/gpu/collect_tests.py report.xml [--output FILE]

Written to benchmarks/results/gpu-tests-<name of the GPU>.json: for each file how many tests passed, failed and were
skipped, which failed, and why some were skipped. When and where they ran, and of which commit, the report says itself
(tests/gpu/conftest.py writes it): it can be collected anywhere. Only a report of all tests on a GPU is taken.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent)]

from facts import slug  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
FACTS = {"rehearsal", "gpu", "driver", "versions", "commit", "files", "deselected"}


class WrongInput(Exception):
    """One line that names the thing and the fix."""


def read_report(path: Path) -> dict[str, Any]:
    """What pytest's report says.

    Returns:
        ``date`` (of its timestamp), ``facts`` (what tests/gpu/conftest.py wrote) and ``files``: test file -> passed,
        failed, skipped (counts), seconds, ``failures`` (tests) and ``skips`` (reasons).

    Raises:
        WrongInput: no report of pytest's, or one without tests, or one that does not say when or where they ran.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise WrongInput(f"{path} cannot be read: {error.strerror or error}") from None
    except ElementTree.ParseError as error:
        raise WrongInput(f"{path} is no report: {error}; make one with pytest --junitxml={path}") from None
    files = _counted(root)
    if not files:
        raise WrongInput(f"{path} has no tests: make it with pytest --junitxml={path}")
    return {"date": _date_of(path, root), "facts": _facts_of(path, root), "files": files}


def _date_of(path: Path, root: ElementTree.Element) -> str:
    suite = next(root.iter("testsuite"), root)
    try:
        return datetime.fromisoformat(suite.get("timestamp", "")).date().isoformat()
    except ValueError:
        raise WrongInput(f"{path} does not say when its tests ran: make one with pytest --junitxml={path}") from None


def _facts_of(path: Path, root: ElementTree.Element) -> dict[str, Any]:
    told = [entry.get("value") for entry in root.iter("property") if entry.get("name") == "verl_fp16"]
    try:
        facts = json.loads(told[0])
        if facts["gpu"] and FACTS <= facts.keys():
            return facts
    except (IndexError, ValueError, TypeError, KeyError):
        pass
    raise WrongInput(
        f"{path} does not say where its tests ran: run them on a GPU, in one process, with python -m pytest tests/gpu "
        f"--junitxml={path}"
    )


def refuse_a_part(path: Path, facts: dict[str, Any], files: dict[str, Any]) -> None:
    """
    Raises:
        WrongInput: the report is not of all tests, or of a rehearsal.
    """
    if facts["rehearsal"] or facts["gpu"] == "cpu":
        raise WrongInput(f"{path} is of a rehearsal on a CPU: run them without VERL_FP16_REHEARSE_GPU_TESTS on a GPU")
    missing = [file for file in facts["files"] if file not in files]
    left_out = [f"without {', '.join(missing)}"] if missing else []
    left_out += [f"{facts['deselected']} were left out"] if facts["deselected"] else []
    if left_out:
        raise WrongInput(f"{path} is of a part of them: {'; '.join(left_out)}. Run all: python -m pytest tests/gpu")


def _counted(root: ElementTree.Element) -> dict[str, dict[str, Any]]:
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
    return dict(sorted(files.items()))


def _file_of(case: ElementTree.Element) -> str:
    """From pytest's ``tests.gpu.test_x`` (with a class, where there is one); a file that cannot be imported: itself."""
    parts = (case.get("classname") or case.get("name") or "unknown").split(".")
    last = max((n for n, part in enumerate(parts) if part.startswith("test_")), default=len(parts) - 1)
    return "/".join(parts[: last + 1]) + ".py"


def _write(output: Path, result: dict[str, Any]) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise WrongInput(f"--output {output}: {error.strerror or error}: name another file") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what pytest --junitxml wrote")
    parser.add_argument("--output", type=Path, help="the result's file")
    options = parser.parse_args(arguments)
    try:
        found = read_report(options.report)
        refuse_a_part(options.report, found["facts"], found["files"])
        output = options.output or RESULTS / f"gpu-tests-{slug(found['facts']['gpu'])}.json"
        head = {name: found["facts"][name] for name in ("gpu", "driver", "versions", "commit")}
        files = {file: row for file, row in found["files"].items() if file in found["facts"]["files"]}
        _write(output, {**head, "date": found["date"], "files": files})
    except WrongInput as error:
        print(f"collect_tests.py: {error}", file=sys.stderr)
        return 2
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
