"""What all parts share: their settings, sides that take turns, and memory."""

from __future__ import annotations

import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What a part is to measure.

    Args:
        model: folder.
        device: cuda or cpu.
        pairs: rounds in which every side has a turn.
        prompts, prompt_tokens, answer_tokens: of the rollout.
        sequences, tokens, micro_batch: of a log-prob pass and an update.
        rows: of 4096 tokens at most, for the statistics of the gap.
    """

    model: str
    device: str
    pairs: int
    prompts: int = 256
    prompt_tokens: int = 128
    answer_tokens: int = 512
    sequences: int = 64
    tokens: int = 1024
    micro_batch: int = 4
    rows: int = 2048


TINY = {
    "prompts": 4,
    "prompt_tokens": 8,
    "answer_tokens": 8,
    "sequences": 4,
    "tokens": 16,
    "micro_batch": 2,
    "rows": 8,
}


def token_rows(number: int, length: int) -> list[list[int]]:
    """Random texts in tokens that every tokenizer has, seed 0."""
    source = random.Random(0)
    return [[source.randrange(5, 250) for _ in range(length)] for _ in range(number)]


def alternated(
    sides: Mapping[str, Callable[[int], object]], settings: Settings, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each turn of each side.

    In each round every side has a turn; the order is turned round from round to round.

    Args:
        sides: name -> what is measured; it is called with a number that is another one in each round.
        warm: rounds before, which do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warm, settings.pairs):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            wait(settings.device)
            started = time.perf_counter()
            sides[name](number + warm)
            wait(settings.device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def wait(device: str) -> None:
    """Until the GPU has done what it was asked."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high]}


def throughput(seconds: Mapping[str, list[float]], tokens: int, base: str) -> dict[str, Any]:
    """Tokens per second of each side, and the ratios of neighbours: each side over ``base``."""
    rates = {name: [tokens / value for value in values] for name, values in seconds.items()}
    return _compared(rates, base, "tokens/s") | {"tokens": tokens}


def durations(seconds: Mapping[str, list[float]], base: str) -> dict[str, Any]:
    """Seconds of each side, and the ratios of neighbours: each side over ``base``."""
    return _compared(seconds, base, "s")


def _compared(values: Mapping[str, list[float]], base: str, unit: str) -> dict[str, Any]:
    ratios = {
        f"{name} over {base}": spread([a / b for a, b in zip(found, values[base], strict=True)])
        for name, found in values.items()
        if name != base and base in values
    }
    sides = {name: spread(found) for name, found in values.items()}
    return {"unit": unit, "pairs": len(next(iter(values.values()))), "sides": sides, "ratios": ratios}


class Memory:
    """Bytes of this process on the device; on a CPU, resident ones."""

    def __init__(self, device: str) -> None:
        self._device = device

    def now(self) -> int:
        if self._device == "cpu":
            return _resident("VmRSS")
        import torch

        wait(self._device)
        return torch.cuda.memory_allocated()

    def peak_of(self, work: Callable[[], object]) -> int:
        """The most at any time while ``work`` is done."""
        if self._device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # the highest size is counted from here on
            work()
            return _resident("VmHWM")
        import torch

        wait(self._device)
        torch.cuda.reset_peak_memory_stats()
        work()
        wait(self._device)
        return torch.cuda.max_memory_allocated()


def _resident(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def join_group_of_one(device: str) -> None:
    """A process group for verl's engines, of this process alone."""
    import torch
    import torch.distributed as dist

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29431")
    if device != "cpu":
        torch.cuda.set_device(0)
    import verl  # noqa: F401  its plugins are loaded

    store = Path(tempfile.mkdtemp()) / "store"
    backend = "cpu:gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
