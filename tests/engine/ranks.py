"""Runs a function on several ranks over gloo, each in a fresh process in which verl chose the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rank_processes import RankProcesses
from releases import RELEASES, release_environment, version_of


def on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    folder: Path,
    release: str = RELEASES[-1],
    env: dict[str, str] | None = None,
) -> list[Any]:
    """As :meth:`rank_processes.RankProcesses.call`, on the CPU, with the verl of ``release``."""
    check = (
        f"assert verl.__version__ == {version_of(release)!r}, verl.__file__\n"
        "assert {'verl_fp16.plugin', 'verl_fp16.cpu.plugin'} <= sys.modules.keys(), 'verl loads the plugins'"
    )
    environment = {**release_environment(release), "VERL_PLATFORM": "cpu", **(env or {})}
    return RankProcesses("cpu", check, environment, timeout_s=400).call(world_size, function, args, folder)
