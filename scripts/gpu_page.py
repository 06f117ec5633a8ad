"""The README's section on GPUs, from the result files under benchmarks/results.

``gpu-tests-*.json`` is written by benchmarks/gpu/collect_tests.py, ``selftest-gpu-*.json`` by the selftest,
``gpu-*.json`` by benchmarks/gpu/run.py. Nothing is verified that has no file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
KINDS = {
    "gpu-tests": "the tests under tests/gpu",
    "selftest-gpu": "the selftest",
    "gpu": "the benchmarks under benchmarks/gpu",
}
_PARTS = {
    "rollout": "rollout (vLLM)",
    "log_prob": "log-prob pass",
    "update": "update",
    "sync": "weight sync",
    "metrics": "statistics of the gap",
}
_LISTED = 6


def read_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Kind -> results, in the order of their files' names.

    Raises:
        ValueError: a file of that name is no result; with the file.
    """
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    body = {"gpu-tests": "files", "selftest-gpu": "rows", "gpu": "parts"}
    for kind in KINDS:
        for path in sorted(folder.glob(f"{kind}-*.json")):
            if kind == "gpu" and path.name.startswith("gpu-tests-"):
                continue
            result = json.loads(path.read_text())
            if missing := [key for key in ("date", "gpu", "driver", "versions", body[kind]) if key not in result]:
                raise ValueError(f"{path.name} is no result of {KINDS[kind]}: it has no {' and no '.join(missing)}")
            found[kind].append(result)
    return found


def gpu_table(folder: Path = RESULTS) -> str:
    """What was verified on which GPU on which date, and what was not."""
    results = read_results(folder)
    lines: list[str] = []
    if any(results.values()):
        lines += ["| GPU | date | what | passed | failed | skipped | with |", "|---|---|---|---|---|---|---|"]
        lines += [_outcome_row(kind, result) for kind in KINDS for result in results[kind]]
        for result in results["gpu"]:
            lines += ["", *_figures(result)]
        lines += _told(results)
    for kind in (kind for kind in KINDS if not results[kind]):
        lines += [""] if lines else []
        lines.append(f"**Not yet verified on a GPU:** {KINDS[kind]}. There is no `benchmarks/results/{kind}-*.json`.")
    return "\n".join(lines)


def _outcome_row(kind: str, result: dict[str, Any]) -> str:
    counts = {status: sum(1 for _, found, _ in _outcomes(kind, result) if found == status) for status in _STATUSES}
    if kind == "gpu-tests":
        counts = {status: sum(row[status] for row in result["files"].values()) for status in _STATUSES}
    cells = (result["gpu"], result["date"], KINDS[kind], *(str(counts[status]) for status in _STATUSES), _made(result))
    return f"| {' | '.join(map(_cell, cells))} |"


_STATUSES = ("passed", "failed", "skipped")


def _outcomes(kind: str, result: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """(name, status, reason) of whatever was tried."""
    if kind == "gpu-tests":
        for file, row in result["files"].items():
            yield from ((f"{file} {name}", "failed", "") for name in row["failures"])
            yield from ((file, "skipped", reason) for reason in row["skips"])
    elif kind == "selftest-gpu":
        for row in result["rows"]:
            yield row["name"], _status(row["status"]), row.get("reason") or ""
    else:
        for name, part in result["parts"].items():
            label = _PARTS.get(name, name)
            failed = [
                (f"{label}, {side}", row["failed"]) for side, row in part.get("sides", {}).items() if "failed" in row
            ]
            if "failed" in part:
                yield label, "failed", part["failed"]
            elif failed:
                yield from ((side, "failed", reason) for side, reason in failed)
            else:
                yield label, "passed", ""


def _status(said: str) -> str:
    for status in _STATUSES:
        if len(said) >= 4 and status.startswith(said.lower()[:4]):  # pass, fail and skip mean the same
            return status
    raise ValueError(f"a result of the selftest has the status {said!r}: known are {', '.join(_STATUSES)}")


def _told(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line for each thing that failed, and for each reason to skip."""
    lines = []
    for kind, found in results.items():
        for result in found:
            rows = [row for row in _outcomes(kind, result) if row[1] != "passed"]
            by_reason: dict[tuple[str, str], list[str]] = {}
            for name, status, reason in rows:
                by_reason.setdefault((status, reason), []).append(name)
            for (status, reason), names in sorted(by_reason.items()):
                more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                why = f": {reason}" if reason else ""
                lines.append(f"- {result['gpu']}, {status}: {', '.join(names[:_LISTED])}{more}{why}")
    return ["", *lines] if lines else []


def _figures(result: dict[str, Any]) -> list[str]:
    """Every figure of a benchmark with its quartiles, and its ratio to what it is compared with."""
    lines = [
        f"| {_cell(result['gpu'])} | side | median [quartiles] | ratio: median [quartiles] | most memory |",
        "|---|---|---|---|---|",
    ]
    for name, part in result["parts"].items():
        for side, row in part.get("sides", {}).items():
            if "failed" in row:
                continue
            ratio = next((r for pair, r in part["ratios"].items() if pair.startswith(f"{side} over ")), None)
            cells = (
                _PARTS.get(name, name),
                side,
                f"{_spread(row, _figure)} {part['unit']}" + _bytes(row),
                "1" if ratio is None else _spread(ratio, "{:.3f}".format),
                f"{row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else "-",
            )
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    model = result.get("model")
    if model:
        lines += ["", f"{model['name']}, {model['architecture']} of {model['parameters'] / 1e6:,.0f} M parameters."]
    return lines


def _bytes(row: dict[str, Any]) -> str:
    return f", {row['bytes'] / 1e6:,.1f} MB" if "bytes" in row else ""


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _spread(row: dict[str, Any], form: Any) -> str:
    low, high = row["quartiles"]
    return f"{form(row['median'])} [{form(low)}, {form(high)}]"


def _made(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"driver {result['driver']}; {versions}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
