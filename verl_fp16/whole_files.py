"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def taking_its_place(file: Path) -> Iterator[Path]:
    """Yields where to write; what is there afterwards takes the place of ``file``.

    Where that fails, or is interrupted, ``file`` is as it was and nothing else is left. A device or a pipe, as
    /dev/null, keeps its place and is written to.
    """
    if file.exists() and not file.is_file() and not file.is_dir():
        yield file
        return
    fresh = file.with_name(f".{file.name}.tmp")
    try:
        yield fresh
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes) -> None:
    with taking_its_place(file) as fresh:
        fresh.write_bytes(content)
