"""The read-back for people and for programs: one table, one file."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from verl_fp16.readback.compare import Answer, Difference
from verl_fp16.settings import Settings
from verl_fp16.whole_files import write_whole

FILE = Path("verl_fp16") / "read-back.json"

# Ray prefixes every line with the process; the table has to fit beside it.
_WIDTH = 140
_HEADINGS = ("role", "ranks", "compute", "parameters", "reduce", "master", "loss scaler", "KV cache", "attention", "on")


def table(answers: Sequence[Answer]) -> Table:
    """One row for each role and each distinct state of it, with the ranks that are in that state."""
    rows: dict[tuple[str, ...], list[Answer]] = defaultdict(list)
    for answer in answers:
        for role, fields in (answer.report or {}).get("roles", {}).items():
            rows[(role, *_cells(role, fields))].append(answer)
        if answer.report is None:
            role = "/".join(answer.roles) or answer.who
            rows[(role, "did not report", *[""] * (len(_HEADINGS) - 3))].append(answer)
    result = Table(title="What runs, read back before the first rollout", box=box.SIMPLE, title_justify="left")
    for heading in _HEADINGS:
        result.add_column(heading)
    for (role, *cells), members in rows.items():
        result.add_row(role, _ranks(role, members), *cells)
    result.caption = _caption(answers)
    return result


def _caption(answers: Sequence[Answer]) -> str:
    reports = [answer.report for answer in answers if answer.report]
    caption = [f"{len(reports)} of {len(answers)} processes reported"]
    if reports:
        caption.append(", ".join(f"{name} {version}" for name, version in reports[0]["versions"].items()))
        states = Counter(status.partition(":")[0] for report in reports for status in report["hooks"].values())
        caption.append("hooks: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    return "; ".join(caption)


def _cells(role: str, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells below :data:`_HEADINGS`, from "compute" on."""
    if role == "rollout":
        cells = {
            "compute": fields["model_dtype"],
            "parameters": fields["parameters"],
            "KV cache": fields["kv_cache"] or fields["kv_cache_setting"],
            "on": fields["device"],
        }
    else:
        scaler = "none"
        if fields["scaler"] is not None:
            scaler = f"{fields['scaler']} {fields['scale']:g}{'' if fields['scaler_enabled'] else ' (disabled)'}"
        cells = {
            "compute": fields["autocast"],
            "parameters": fields["fsdp_param"],
            "reduce": fields["fsdp_reduce"],
            "master": "none" if fields["master"] is None else fields["master"],
            "loss scaler": scaler,
            "attention": fields["attention"],
            "on": fields["device"],
        }
    return tuple(_text(cells.get(heading, "")) for heading in _HEADINGS[2:])


def _text(value: Any) -> str:
    return "/".join(value) if isinstance(value, list) else str(value)


def _ranks(role: str, members: Sequence[Answer]) -> str:
    if role == "rollout" or any(member.report is None for member in members):
        return f"{len(members)} process{'es' if len(members) > 1 else ''}"
    ranks = sorted(member.report["rank"] or 0 for member in members)
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))


def show(answers: Sequence[Answer]) -> None:
    """Print the table to standard output."""
    Console(width=_WIDTH).print(table(answers))


def write(
    folder: str | os.PathLike[str], settings: Settings, answers: Sequence[Answer], found: Sequence[Difference]
) -> Path:
    """Write everything to ``<folder>/verl_fp16/read-back.json``, wholly or not at all.

    Returns:
        the file.
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "declared": asdict(settings),
        "differences": [str(difference) for difference in found],
        "processes": [asdict(answer) for answer in answers],
    }
    write_whole(path, json.dumps(content, indent=2).encode())
    return path
