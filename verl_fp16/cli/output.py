"""What the commands print: tables for a terminal, tab-separated lines for everything else, errors as one message."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TextIO

import typer

WRONG_INPUT = 2


def fail(message: object, code: int = WRONG_INPUT) -> typer.Exit:
    """Print ``message`` on stderr; raise what is returned to end with ``code``."""
    text = str(message)
    typer.echo(text.rstrip() if text.startswith("verl_fp16: ") else f"verl-fp16: {text}", err=True)
    return typer.Exit(code)


def without_effect(ctx: typer.Context, names: Collection[str], where: str) -> str | None:
    """A line on those of the parameters ``names`` that were given on the command line; None where none was.

    Args:
        where: they have no effect, such as "beside --ladder".
    """
    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in names and (source := ctx.get_parameter_source(parameter.name)) is not None
        if source.name == "COMMANDLINE"
    ]
    if not given:
        return None
    told = " and ".join(filter(None, [", ".join(given[:-1]), given[-1]]))
    return f"{told} {'have' if given[1:] else 'has'} no effect {where}: leave {'them' if given[1:] else 'it'} out"


def require_folder(output: Path) -> None:
    """
    Raises:
        typer.Exit: ``--output`` is a file.
    """
    if output.exists() and not output.is_dir():
        raise fail(f"--output {output}: this is a file, and a folder is needed. Name another")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether this is a terminal; a stream that was closed before the start is None."""
    return stream is not None and stream.isatty()


def let_go(stream: TextIO | None) -> None:
    """Lose what cannot be written: Python would try to at its end once more, and end with 120 for it."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], header: bool = False) -> None:
    """A table where stdout is a terminal; elsewhere a line for each row, uncut, with a tab between its cells.

    Args:
        rows: a cell is a string or a rich renderable whose ``plain`` is its text.
        header: whether the names of the columns are the first of these lines.
    """
    if not is_terminal(sys.stdout):
        if header:
            typer.echo("\t".join(columns))
        for row in rows:
            typer.echo("\t".join(str(getattr(cell, "plain", cell)) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    Console().print(table)
