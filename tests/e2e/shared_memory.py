"""Shared memory that a test's runs left: what was there before the tests is not theirs."""

from __future__ import annotations

from pathlib import Path

from verl_fp16.leftovers import shared_memory_files

SHM = Path("/dev/shm")
BEFORE = shared_memory_files(SHM)


def left_shared_memory() -> list[str]:
    """Names under /dev/shm that have come since the tests began."""
    return sorted(name for name, inode in shared_memory_files(SHM).items() if BEFORE.get(name) != inode)
