"""What verl calls on ``torch.cuda``, for a CPU."""

from __future__ import annotations

import resource
from collections.abc import Callable
from types import ModuleType
from typing import Any

import psutil
import torch


class CpuDevice(ModuleType):
    """What verl calls on ``torch.cuda``, for a CPU: memory is the process's resident set, streams do nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_name(self, device: Any = None) -> str:
        return "CPU"

    def set_device(self, device: Any) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def ipc_collect(self) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def memory_allocated(self, device: Any = None) -> int:
        """Bytes resident now."""
        return psutil.Process().memory_info().rss

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        """Most bytes that were ever resident."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free and total bytes of the host."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


CPU_DEVICE = CpuDevice("verl_fp16.cpu.device")


def no_accelerator(module: ModuleType) -> Callable[[], None]:
    """Make ``verl.utils.device`` of verl 0.8, which knows no platforms, see a CPU and nothing else.

    ``get_device_name`` and ``get_device_id`` read these names when they are called, so they need no wrapper.
    """
    seen = {"is_cuda_available": False, "is_npu_available": False, "get_torch_device": lambda: CPU_DEVICE}
    before = {name: getattr(module, name) for name in seen}
    vars(module).update(seen)

    def undo() -> None:
        vars(module).update(before)

    return undo
