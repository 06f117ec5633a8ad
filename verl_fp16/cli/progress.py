"""How far a long command is: a bar on a terminal, elsewhere a line now and then; on stderr, with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from verl_fp16.cli.output import is_terminal

Tell = Callable[..., None]
"""``tell(stage, done, of, told="")``; what ``told`` says is shown beside it."""

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def stages_shown(unit: str) -> Iterator[Tell]:
    """Show one stage after the other. Speed counts from the last time that a stage's first number was told.

    Args:
        unit: what is counted, in the plural.
    """
    if is_terminal(sys.stderr):
        yield from _bars()
    else:
        yield _lines(unit)


def _bars() -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, int] = {}
        first: dict[str, int] = {}

        def tell(stage: str, done: int, of: int, told: str = "") -> None:
            if stage not in first:
                tasks[stage], first[stage] = progress.add_task(stage, total=of, told=told), done
            if done == first[stage]:
                progress.reset(tasks[stage])
            progress.update(tasks[stage], completed=done, total=of, told=told)

        yield tell


def _lines(unit: str) -> Tell:
    began: dict[str, tuple[float, int]] = {}
    ended: set[str] = set()
    last = 0.0

    def tell(stage: str, done: int, of: int, told: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        new, before = stage not in began, began.get(stage, (now, done))[1]
        if done == before:
            began[stage], last = (now, done), now
        if stage in ended or not (new or done == of or now - last >= _SECONDS_BETWEEN_LINES):
            return
        last = now
        if done == of:
            ended.add(stage)
        left = (now - began[stage][0]) / (done - before) * (of - done) if done > before else 0
        about = f", about {clock(left)} left" if left else ""
        typer.echo(f"{stage}: {done:,} of {of:,} {unit}{f', {told}' if told else ''}{about}", err=True)

    return tell


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
