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
_STATUSES = ("passed", "failed", "skipped")
_BODY = {"gpu-tests": "files", "selftest-gpu": "rows", "gpu": "parts"}


def read_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Kind -> results, in the order of their files' names.

    Raises:
        ValueError: a file of that name is no result; with the file and what is wrong with it.
    """
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for path in sorted(folder.glob(f"{kind}-*.json")):
            if kind == "gpu" and path.name.startswith("gpu-tests-"):
                continue
            try:
                result = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path.name} is no JSON: {error}") from None
            if wrong := _wrong_with(kind, result):
                raise ValueError(f"{path.name} is no result of {KINDS[kind]}: {wrong}")
            found[kind].append(result)
    return found


def _wrong_with(kind: str, result: Any) -> str | None:
    body = _BODY[kind]
    if not isinstance(result, dict):
        return "it is no mapping"
    if missing := [key for key in ("date", "gpu", "driver", "versions", body) if key not in result]:
        return f"it has {' and '.join(f'no {key}' for key in missing)}"
    if not result["gpu"] or result["gpu"] == "cpu":
        return "it names no GPU"
    if not result["versions"].get("verl_fp16"):
        return "it has no version of verl_fp16"
    if not result[body]:
        return f"its {body} are empty"
    return {"gpu-tests": _wrong_file, "selftest-gpu": _wrong_row, "gpu": _wrong_part}[kind](result[body])


def _wrong_file(files: dict[str, Any]) -> str | None:
    wanted = (*_STATUSES, "failures", "skips")
    return next((f"{file} has no {key}" for file, row in files.items() for key in wanted if key not in row), None)


def _wrong_row(rows: list[dict[str, Any]]) -> str | None:
    return next((f"a row has no {key}" for row in rows for key in ("name", "status") if key not in row), None)


def _wrong_part(parts: dict[str, Any]) -> str | None:
    for name, part in parts.items():
        if name not in _PARTS:
            return f"there is no part {name}"
        if "failed" not in part and not (part.get("sides") and {"unit", "ratios"} <= part.keys()):
            return f"the part {name} has neither figures nor a reason"
    return None


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
    for kind, found in results.items():
        if any(_counts(kind, result)["passed"] for result in found):
            continue
        place = f"`benchmarks/results/{kind}-*.json`"
        why = f"In {place} nothing passed." if found else f"There is no {place}."
        lines += [""] if lines else []
        lines.append(f"**Not yet verified on a GPU:** {KINDS[kind]}. {why}")
    return "\n".join(lines)


def _outcome_row(kind: str, result: dict[str, Any]) -> str:
    counts = _counts(kind, result)
    cells = (result["gpu"], result["date"], KINDS[kind], *(str(counts[status]) for status in _STATUSES), _made(result))
    return f"| {' | '.join(map(_cell, cells))} |"


def _counts(kind: str, result: dict[str, Any]) -> dict[str, int]:
    if kind == "gpu-tests":
        return {status: sum(row[status] for row in result["files"].values()) for status in _STATUSES}
    found = [status for _, status, _ in _outcomes(kind, result)]
    return {status: found.count(status) for status in _STATUSES}


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
                why = f": {' '.join(reason.split())}" if reason else ""
                lines.append(f"- {result['gpu']}, {status}: {', '.join(names[:_LISTED])}{more}{why}")
            if missing := [told for part, told in _PARTS.items() if kind == "gpu" and part not in result["parts"]]:
                lines.append(f"- {result['gpu']}, not measured: {', '.join(missing)}")
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
    ways = [_way(name, part) for name, part in result["parts"].items() if "log_probs" in part]
    lines += ["", " ".join(ways)] if ways else []
    model = result.get("model")
    if model:
        lines += ["", f"{model['name']}, {model['architecture']} of {model['parameters'] / 1e6:,.0f} M parameters."]
    return lines


def _way(name: str, part: dict[str, Any]) -> str:
    """With what a part computed; a loop over tokens is no measure of a dtype."""
    loop = ", so that the launching of small kernels is measured as well" if "loop" in part["log_probs"] else ""
    return f"{_PARTS[name]}: attention {part['attention']}, log-probs by {part['log_probs']}{loop}."


def _bytes(row: dict[str, Any]) -> str:
    return f", {row['bytes'] / 1e6:,.1f} MB" if "bytes" in row else ""


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _spread(row: dict[str, Any], form: Any) -> str:
    low, high = row["quartiles"]
    return f"{form(row['median'])} [{form(low)}, {form(high)}]"


def _made(result: dict[str, Any]) -> str:
    """Driver, commit, and versions of what is there."""
    there = [f"{name} {version}" for name, version in result["versions"].items() if version and name != "driver"]
    commit, _, changes = (result.get("commit") or "").partition(" ")
    told = [f"commit {commit[:10]} {changes}".rstrip()] if commit else []
    return "; ".join([f"driver {result['driver'] or 'unknown'}", *told, ", ".join(there)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
