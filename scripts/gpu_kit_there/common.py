"""What every command of the kit shares: errors with exit codes, versions, digests, progress, whole files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

BLOCK = 1 << 20
TELL_EVERY = 10.0  # seconds

FAILED, WRONG_INPUT, INCOMPLETE, INTERRUPTED = 1, 2, 3, 130


class KitError(Exception):
    """Ends the command with one message.

    Args:
        message: what is wrong, of which file or package, and the way out.
        code: the exit code.
    """

    def __init__(self, message: str, code: int = WRONG_INPUT) -> None:
        super().__init__(message)
        self.code = code


def exit_code(command: Callable[[], int], place: Path, interrupted: str) -> int:
    """What ``command`` returns, or the code of what ended it, which is told on stderr in one message.

    Args:
        place: what an error of the system is about where it names no file.
        interrupted: what an interrupt leaves, and how to go on.
    """
    try:
        return command()
    except KitError as error:
        told, code = error, error.code
    except OSError as error:
        told, code = f"{error.filename or place}: {error.strerror or error}", FAILED
    except KeyboardInterrupt:
        told, code = f"interrupted; {interrupted}", INTERRUPTED
    print(f"gpu-kit: {told}", file=sys.stderr)
    return code


def normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def same_version(wanted: str, found: str) -> bool:
    """Whether ``found`` meets ``==wanted``: a local label (+cu130) counts only where one is wanted."""
    return found == wanted or ("+" not in wanted and found.split("+")[0] == wanted)


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class Progress:
    """A line each ten seconds, with what is done and the time left, for what takes longer than that.

    Args:
        doing: what is done, as in "joining".
        total: bytes; 0 where nothing can be counted.
        amount: how a number of them is told.
    """

    def __init__(self, doing: str, total: int, amount: Callable[[float], str] = megabytes) -> None:
        self.doing, self.total, self.done, self.amount = doing, total, 0, amount
        self.begun = self.told = time.monotonic()

    def add(self, size: int) -> None:
        self.done += size
        self.tell()

    def tell(self) -> None:
        now = time.monotonic()
        if now - self.told < TELL_EVERY:
            return
        self.told = now
        if not self.total:
            print(f"{self.doing}: {now - self.begun:.0f} s so far, time left not known", flush=True)
            return
        left = (now - self.begun) * (self.total - self.done) / self.done if self.done else None
        rest = "time left not known yet" if left is None else f"about {left:.0f} s left"
        print(f"{self.doing}: {self.amount(self.done)} of {self.amount(self.total)}, {rest}", flush=True)


def sha256_of(file: Path, progress: Progress | None = None) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            if progress:
                progress.add(len(block))
    return digest.hexdigest()


@contextlib.contextmanager
def taking_its_place(file: Path) -> Iterator[Path]:
    """Yields where to write; ``file`` is replaced by it as a whole, or, on any failure, stays as it was.

    verl_fp16.whole_files does the same; it is not there before the kit is installed.
    """
    fresh = file.with_name(f".{file.name}.tmp")
    try:
        yield fresh
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
