"""Progress with time left, on stderr: a bar on a terminal, elsewhere a line at the start and one every ten seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import typer

from verl_fp16.cli.output import is_terminal

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[float], None]


@contextlib.contextmanager
def progress(what: str, total: float, size: bool = False, amount: str = "") -> Iterator[Advance]:
    """What is yielded is told of each part of ``total`` that is done.

    Args:
        what: is done, such as reading.
        size: whether ``total`` is in bytes.
        amount: of what, for the line at the start.
    """
    if not is_terminal(sys.stderr):
        yield _Lines(what, total, amount)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    done = DownloadColumn(binary_units=True) if size else TaskProgressColumn()
    columns = (TextColumn(what), BarColumn(), done, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda part: bar.update(task, advance=part)


class _Lines:
    def __init__(self, what: str, total: float, amount: str) -> None:
        self._what, self._total, self._done = what, total, 0.0
        self._started = self._told = time.monotonic()
        self._tell(f"{what} {amount}".rstrip())

    def __call__(self, part: float) -> None:
        self._done += part
        now = time.monotonic()
        if now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            left = max(0.0, (now - self._started) / self._done * (self._total - self._done))
            self._tell(f"{self._what}: {min(1.0, self._done / self._total):.0%} done, about {left:.0f} s left")

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # no reason to stop
            typer.echo(f"verl-fp16: {line}", err=True)
