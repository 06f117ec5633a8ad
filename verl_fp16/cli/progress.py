"""How far a long command is: a bar on a terminal, elsewhere a line now and then; on stderr, with the time left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import typer

from verl_fp16.cli.output import is_terminal

Tell = Callable[..., None]
"""``tell(stage, done, of, told="")``; what ``told`` says is shown beside it."""

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def output_goes_to(file: Path) -> Iterator[TextIO]:
    """What this process and its children print goes to the end of ``file``; gives a stream to where stderr was.

    Libraries print on the descriptors, past ``sys.stderr``.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        before = os.dup(sys.stdout.fileno()), os.dup(sys.stderr.fileno())
    except (OSError, ValueError):  # they are no files here: nothing to send elsewhere
        yield sys.stderr
        return
    places = sys.stdout.fileno(), sys.stderr.fileno()
    with open(file, "ab") as log, os.fdopen(os.dup(before[1]), "w", buffering=1) as stderr:
        try:
            for place in places:
                os.dup2(log.fileno(), place)
            yield stderr
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):  # a full disk: what is said of it has to get out
                    stream.flush()
            for place, was in zip(places, before, strict=True):
                os.dup2(was, place)
                os.close(was)


@contextmanager
def stages_shown(unit: str, stream: TextIO | None = None) -> Iterator[Tell]:
    """Show one stage after the other. Speed counts from the last time that a stage's first number was told.

    Args:
        unit: what is counted, in the plural.
        stream: where to; stderr without it.
    """
    stream = sys.stderr if stream is None else stream
    if is_terminal(stream):
        yield from _bars(stream)
    else:
        yield _lines(unit, stream)


def _bars(stream: TextIO) -> Iterator[Tell]:
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
    with Progress(*columns, console=Console(file=stream)) as progress:
        tasks: dict[str, int] = {}
        first: dict[str, int] = {}

        def tell(stage: str, done: int, of: int, told: str = "") -> None:
            if stage not in first:
                tasks[stage], first[stage] = progress.add_task(stage, total=of, told=told), done
            if done == first[stage]:
                progress.reset(tasks[stage])
            progress.update(tasks[stage], completed=done, total=of, told=told)

        yield tell


def _lines(unit: str, stream: TextIO) -> Tell:
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
        typer.echo(f"{stage}: {done:,} of {of:,} {unit}{f', {told}' if told else ''}{about}", file=stream)

    return tell


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def progress(
    what: str, total: float, size: bool = False, amount: str = "", announced: bool = True
) -> Iterator[Callable[[float], None]]:
    """Show how much of one thing is done; what is yielded is to be told of each part of ``total``.

    Args:
        what: is done, such as reading.
        size: whether ``total`` is in bytes.
        amount: of what, for the line at the start; of bytes, their number without it.
        announced: whether there is a line at the start too, where stderr is no terminal.
    """
    if not is_terminal(sys.stderr):
        yield _PartLines(what, total, (amount or (in_words(int(total)) if size else "")) if announced else None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    done = DownloadColumn(binary_units=True) if size else TaskProgressColumn()
    columns = (TextColumn(what), BarColumn(), done, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda part: bar.update(task, advance=part)


class _PartLines:
    """A line at the start, and one about every ten seconds."""

    def __init__(self, what: str, total: float, amount: str | None) -> None:
        self._what, self._total, self._done = what, total, 0.0
        self._started = self._told = time.monotonic()
        if amount is not None:
            self._tell(f"{what} {amount}".rstrip())

    def __call__(self, part: float) -> None:
        self._done += part
        now = time.monotonic()
        if now - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            # A file may have grown since it was measured.
            share = min(1.0, self._done / self._total) if self._total else 1.0
            left = (now - self._started) * (1 - share) / share if share else 0.0
            self._tell(f"{self._what}: {share:.0%} done, about {left:.0f} s left")

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # no reason to stop
            typer.echo(f"verl-fp16: {line}", err=True)


def in_words(size: int) -> str:
    """A number of bytes."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
