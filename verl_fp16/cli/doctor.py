"""``verl-fp16 doctor``: whether a run with the flag would start here."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from verl_fp16.cli.output import print_table

if TYPE_CHECKING:
    from verl_fp16.doctor.examination import Examination

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Look from a worker of a short-lived local Ray.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that each slow check may take.")] = 180,
) -> None:
    """Check whether a run with the flag would start here; exit code 0 only if it would.

    It takes about half a minute: torch, verl and Ray are imported in child processes.
    """
    from verl_fp16.doctor.examination import examine

    with _progress() as announce:
        found = examine(ray=ray, timeout_s=timeout, announce=announce)
    if as_json:
        typer.echo(_as_json(found))
    else:
        _show(found)
    raise typer.Exit(0 if found.would_start else 1)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], object]]:
    """Say on stderr what is being looked at: a spinner on a terminal, a line elsewhere."""
    if not sys.stderr.isatty():
        yield lambda what: typer.echo(f"verl-fp16: looking at {what}", err=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda what: status.update(f"looking at {what}")


def _as_json(found: Examination) -> str:
    rows = [vars(check) for check in found.checks]
    return json.dumps({"would_start": found.would_start, "device": found.device, "checks": rows}, indent=2)


def _show(found: Examination) -> None:
    from rich.text import Text

    rows = [
        (check.name, Text(check.status, style=_STYLES[check.status]), check.found, check.wanted, check.fix)
        for check in found.checks
    ]
    print_table(("check", "status", "found", "wanted", "what to do"), rows)
    errors = [check.name for check in found.checks if check.status == "error"]
    hardware = " +hardware=cpu" if found.device == "cpu" else ""
    if errors:
        typer.echo(f"A run with +precision=fp16{hardware} would not start: {', '.join(errors)}")
    else:
        typer.echo(f"A run with +precision=fp16{hardware} would start.")
