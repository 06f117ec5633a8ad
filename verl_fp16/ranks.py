"""The ranks of the default process group, also where there is none: then this process is the only one."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def in_group() -> bool:
    """Whether this process has a default process group."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)


def of_all_ranks(value: Any) -> list[Any]:
    """What each rank gave, in the order of ranks, on all of them. A collective: pickled, for rare occasions."""
    if not in_group():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
