"""``verl-fp16 report``: what runs learned, how far rollout and training were apart, and where they went wrong."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from verl_fp16.cli.output import WRONG_INPUT, fail, is_terminal, let_go, print_table, require_folder
from verl_fp16.cli.progress import progress

if TYPE_CHECKING:
    from verl_fp16.run_report.assemble import Run

NOT_WRITTEN, INTERRUPTED = 1, 130
_LONG = 100 * 2**20
"""Bytes of logs from which reading them is announced: a second or so."""


class _ReportError(Exception):
    """One line, and the exit code."""

    def __init__(self, line: str, code: int = WRONG_INPUT) -> None:
        super().__init__(line)
        self.code = code


def register(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="A log of verl's file logger, or a folder with one in it; NAME=PATH gives it a name.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the report goes.")] = Path(
        "report"
    ),
    title: Annotated[str, typer.Option("--title", help="Of the report.")] = "",
    smooth: Annotated[
        int | None,
        typer.Option(
            "--smooth", min=1, metavar="N", help="Steps of the running median; 1 for none. By default a 25th of a run."
        ),
    ] = None,
    evidence: Annotated[
        list[str] | None,
        typer.Option(
            "--evidence",
            metavar="NAME=FOLDER",
            help="trainer.default_local_dir of a run, where it is not found beside the log.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table and the findings as JSON.")] = False,
) -> None:
    """Lay runs over each other in a report: an HTML page, Markdown, and pictures.

    The first, the last and the best value of each metric, and where a run went wrong, are printed too. The exit code is
    0 where a report was written, whatever it says, 2 for a wrong input, 1 where it cannot be written, 130 after Ctrl-C.

    Example: verl-fp16 report fp16=outputs/quickstart bf16=outputs/quickstart-bf16 -o outputs/report
    """
    message, code = None, 0
    require_folder(output)
    try:
        _report(runs, output, title, smooth, evidence or [], as_json)
    except KeyboardInterrupt:
        message, code = "interrupted; an earlier report in the folder is as it was", INTERRUPTED
    except _ReportError as error:
        message, code = str(error), error.code
    except OSError as error:  # of what is printed; the report's own files have their own words
        message, code = f"the table could not be printed: {error.strerror}", NOT_WRITTEN
    if message is not None:
        with contextlib.suppress(OSError):
            fail(message)
    for stream in (sys.stdout, sys.stderr):
        let_go(stream)
    raise typer.Exit(code)


def _report(
    named: Sequence[str], output: Path, title: str, smooth: int | None, evidence: Sequence[str], as_json: bool
) -> None:
    runs = _read(named, evidence)
    try:
        from verl_fp16.run_report.writing import make, put

        made = make(title or _title(runs), runs, smooth)
        written, failure = put(output, made), None
    except ImportError as error:
        written, failure = [], _ReportError(f"{error}: matplotlib is needed for the pictures: pip install matplotlib")
    except OSError as error:
        reason = error.strerror or error
        written, failure = [], _ReportError(f"{output}: the report could not be written: {reason}", NOT_WRITTEN)
    # What was found is told in any case: reading the logs was the work.
    with contextlib.suppress(BrokenPipeError):
        if as_json:
            _print_json(runs, written)
        else:
            _print(runs, written)
    if failure is not None:
        raise failure


def _read(named: Sequence[str], evidence: Sequence[str]) -> list[Run]:
    try:
        from verl_fp16.run_report.assemble import load
        from verl_fp16.run_report.places import RunError, find_runs
    except ImportError as error:
        raise _ReportError(f"{error}: numpy and matplotlib are needed: pip install matplotlib") from None
    try:
        places = find_runs(named, evidence)
        total = sum(place.log.stat().st_size for place in places)
        with progress("reading", total, size=True, announced=total >= _LONG) as advance:
            return [load(place, advance) for place in places]
    except RunError as error:
        raise _ReportError(_one_line(str(error))) from None
    except OSError as error:
        raise _ReportError(_one_line(f"{error.filename}: it cannot be read ({error.strerror})")) from None


def _title(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs[:4]) + ", ..." * (len(runs) > 4)


def _one_line(text: str) -> str:
    """``text`` with escapes for what would not be seen or could steer a terminal, or that stdout cannot encode."""
    from verl_fp16.run_report.contents import printable

    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def _print_json(runs: Sequence[Run], written: Sequence[Path]) -> None:
    from verl_fp16.run_report.contents import as_json

    found = {**as_json(runs), "written": [str(path) for path in written]}
    typer.echo(json.dumps(found, indent=2, allow_nan=False))


def _print(runs: Sequence[Run], written: Sequence[Path]) -> None:
    from verl_fp16.run_report import contents

    print_table(contents.COLUMNS, [[*map(_one_line, row.cells())] for row in contents.rows(runs)], header=True)
    for run in runs:
        for finding in run.findings:
            _say(f"{run.name}, step {finding.step:,}: {finding.text}")
        for note in run.notes:
            _say(f"{run.name}: note: {note}")
    if not any(run.findings for run in runs):
        _say(contents.nothing_found(runs))
    for path in written:
        if path.suffix != ".png":
            _say(f"written: {path}")


def _say(text: str) -> None:
    line = _one_line(text)
    if is_terminal(sys.stdout):
        from rich.console import Console

        Console().print(line, markup=False, highlight=False, soft_wrap=True)
    else:
        typer.echo(line)
