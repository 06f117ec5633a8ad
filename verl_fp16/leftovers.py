"""What a training run leaves on the machine when its processes are killed: shared memory, Ray's temporary folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

SHARED_MEMORY = ("psm_*", "verl_weights_*", "sem.mp-*", "vllm_dist_*")
"""Python's shared memory, verl's weight transfer, Python's semaphores, tensor parallelism of vLLM's CPU build."""

# What Ray appends to its temporary directory: "/session_<date>_<time>_<us>_<pid>/sockets/plasma_store" and a suffix.
_RAY_SOCKET_BYTES = 68
_UNIX_SOCKET_BYTES = 107


def shared_memory_files(folder: Path) -> dict[str, int]:
    """Name and inode of our own shared-memory files of the kinds in `SHARED_MEMORY`."""
    files = {}
    for path in (path for pattern in SHARED_MEMORY for path in folder.glob(pattern)):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid == os.geteuid():
                files[path.name] = status.st_ino
    return files


def other_run_is_alive(variable: str, mine: str) -> bool:
    """Whether some process carries environment ``variable`` with another value than ``mine``."""
    prefix = f"{variable}=".encode()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if any(entry.startswith(prefix) and entry != prefix + mine.encode() for entry in entries):
                return True
    return False


def remove_shared_memory(folder: Path, before: Mapping[str, int]) -> list[str]:
    """Remove shared-memory files that are not in `before` and that no live process uses; return their names."""
    fresh = {name for name, inode in shared_memory_files(folder).items() if before.get(name) != inode}
    folder_name = f"{folder}/"
    for pid in psutil.pids() if fresh else ():
        # Another user's process cannot be read, but neither could it have opened a file of ours.
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", errors="replace") as maps:
            fresh -= {line.rstrip("\n").rpartition("/")[2] for line in maps if folder_name in line}
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    fresh.discard(os.path.basename(os.readlink(entry.path)))
    removed = []
    for name in sorted(fresh):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
            removed.append(name)
    return removed


@contextlib.contextmanager
def shared_memory_given_back(folder: Path = Path("/dev/shm")) -> Iterator[None]:
    """Remove at the end what was made in ``folder`` meanwhile and no live process uses: a killed vLLM leaves files."""
    before = shared_memory_files(folder)
    try:
        yield
    finally:
        remove_shared_memory(folder, before)


@contextlib.contextmanager
def ray_temp_dir() -> Iterator[Path]:
    """Make a temporary directory for Ray (`ray.init(_temp_dir=...)`), and delete it with its contents at the end.

    Its path is short enough for the Unix sockets that Ray makes below it, whose paths may have 107 bytes.

    Raises:
        OSError: no temporary folder of the system is writable and has a short enough path.
    """
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path = Path(tempfile.mkdtemp(prefix="r", dir=folder))
            if len(os.fsencode(path)) + _RAY_SOCKET_BYTES <= _UNIX_SOCKET_BYTES:
                break
            path.rmdir()
    else:
        raise OSError(f"no temporary folder leaves {_RAY_SOCKET_BYTES} bytes for Ray's socket paths: set TMPDIR")
    try:
        yield path
    finally:
        # Ray's last processes may still be deleting files of their own; what is left is in the temporary folder.
        shutil.rmtree(path, ignore_errors=True)
