"""The report as Markdown, with the groups' PNGs beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from verl_fp16.run_report import contents
from verl_fp16.run_report.assemble import Run
from verl_fp16.run_report.curves import typeset

# Underscores between letters are none of Markdown's; the rest has a meaning anywhere in a line.
_SPECIAL = re.compile(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;"})


def escape(text: str) -> str:
    """As text and nothing else, in one line."""
    return _SPECIAL.sub(r"\\\1", contents.printable(text).translate(_ENTITIES))


def with_code(text: str) -> str:
    """As :func:`escape`, with what is between backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return "".join(code(part) if number % 2 and part else escape(part) for number, part in enumerate(parts))


def code(text: str) -> str:
    """As a code span, which no backtick in it ends."""
    shown = contents.printable(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def render(title: str, date: str, runs: Sequence[Run], pictures: Mapping[str, str], window: int | None) -> str:
    """The whole file.

    Args:
        date: of today.
        pictures: group -> file name of its PNG.
        window: as in :func:`figures.draw_panel`.
    """
    return "\n".join(_lines(title, date, runs, pictures, window)) + "\n"


def _lines(
    title: str, date: str, runs: Sequence[Run], pictures: Mapping[str, str], window: int | None
) -> Iterator[str]:
    yield from (f"# {escape(title)}", "", f"{date}; {', '.join(escape(run.name) for run in runs)}", "")
    yield from ("## Where it went wrong", "")
    findings = [(run, finding) for run in runs for finding in run.findings]
    for run, finding in findings:
        advice = f" What to do: {with_code(finding.advice)}." if finding.advice else ""
        command = f" Its tokens: {code(finding.command)}" if finding.command else ""
        yield f"- **{escape(run.name)}**, step {finding.step:,}: {with_code(finding.text)}.{advice}{command}"
    if not findings:
        yield contents.nothing_found(runs)
    yield from ("", "## First, last, best", "")
    yield _row(contents.COLUMNS)
    yield "|---|---|---:|---:|---:|---:|"
    for row in contents.rows(runs):
        metric, name, *numbers = row.cells()
        yield _row(
            [
                f"{escape(metric)}<br>{escape(contents.unit_and_direction(row.panel))}",
                escape(name),
                *map(typeset, numbers),
            ]
        )
    if missing := contents.unmeasured(runs):
        yield from ("", missing)
    for group, panels in contents.groups(runs):
        yield from ("", f"## {escape(group)}", "", f"![{escape(group)}]({pictures[group]})", "")
        yield "Shown: " + "; ".join(f"{escape(panel.title)}: {code(contents.remark(panel, runs))}" for panel in panels)
    for run in runs:
        yield from ("", f"## {escape(run.name)}", "")
        yield from _of_run(run)
    yield from ("", "## How to read this", "")
    yield from (f"- {escape(line)}" for line in contents.explanation(window))


def _of_run(run: Run) -> Iterator[str]:
    for label, text in contents.facts(run):
        yield f"- {label}: {escape(text)}"
    for note in run.notes:
        yield f"- note: {escape(note)}"
    if run.evidence.tokens:
        yield from (
            "",
            f"{contents.tokens_heading(run)}:",
            "",
            _row(contents.TOKEN_COLUMNS),
            "|---:|---:|---:|---:|---|",
        )
        for token in run.evidence.tokens:
            *numbers, (before, inner, after) = contents.token_cells(token)
            context = f"{escape(before)}**\\[{escape(inner)}\\]**{escape(after)}"
            yield _row([*map(typeset, numbers), context])
    if run.evidence.command:
        yield from ("", "```", contents.printable(run.evidence.command), "```")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
