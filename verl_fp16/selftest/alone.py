"""One self-test in a folder at a time: a second one would take away what the first is running."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK = ".selftest.lock"
# A file system without locks, as some that are shared: better a self-test than none.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Taken(RuntimeError):
    """Another self-test is at work there; the message says which process."""


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder, which is made where it is not there. What ended in any way holds it no longer.

    Raises:
        Taken: another process holds it.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Taken(f"another selftest is at work there (process {file.read().strip() or 'unknown'})") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
