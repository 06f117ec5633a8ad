"""One process as the operating system has it: alive, its titles, how it ended (Linux only)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def titles(process: psutil.Process) -> tuple[str, ...]:
    """The full title or command line, the base name of the program, and the kernel's name; empty once it has ended."""
    try:
        arguments = process.cmdline()
        name = process.name()
    except psutil.Error:
        return ()
    if not arguments:
        return ()
    return " ".join(arguments).strip(), os.path.basename(arguments[0]), name


def label(process: psutil.Process) -> str:
    return f"{(titles(process) or ('process',))[0][:80]} (pid {process.pid})"


def zombie_status(process: psutil.Process) -> int | None:
    """The wait status of a process that has ended but is not reaped yet, else None."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[-1]) if fields[0] == "Z" and process.is_running() else None


def exit_text(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (often the kernel, out of memory)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
