"""Facts of the machine: processor, memory, shared memory, open files, GPU driver. Linux: reads /proc."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

_ISA = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")
_SMI_S = 20.0
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Host:
    """What matters of a machine. Sizes are bytes; None is unknown or not there.

    Args:
        machine: the architecture, as ``uname -m`` says it.
        isa: the vector extensions of this processor that vLLM's CPU build uses.
        cores: cores that this process may use.
        memory, memory_available: of the machine, or of the container where that has less.
        shm, shm_free: size and free space of /dev/shm.
        open_files: the hard limit, to which Ray raises its processes.
        gpu_device: whether the kernel shows a GPU (NVIDIA or AMD).
        driver: version of NVIDIA's kernel driver.
    """

    machine: str
    isa: tuple[str, ...]
    cores: int
    memory: int
    memory_available: int
    shm: int | None
    shm_free: int | None
    open_files: int
    gpu_device: bool
    driver: str | None


def read_host(shm: Path = Path("/dev/shm")) -> Host:
    """Read the facts of this machine."""
    memory = psutil.virtual_memory()
    limit = _memory_limit()
    try:
        usage = shutil.disk_usage(shm)
    except OSError:
        usage = None
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return Host(
        machine=platform.machine(),
        isa=_isa(_text("/proc/cpuinfo")),
        cores=len(os.sched_getaffinity(0)),
        memory=min(memory.total, limit),
        memory_available=min(memory.available, limit),
        shm=usage.total if usage else None,
        shm_free=usage.free if usage else None,
        open_files=2**31 if hard == resource.RLIM_INFINITY else hard,
        gpu_device=any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd")),
        # Some sandboxes show no /proc/driver.
        driver=_driver(_text("/proc/driver/nvidia/version")) or _driver_by_nvidia_smi(),
    )


def _isa(cpuinfo: str) -> tuple[str, ...]:
    match = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    return tuple(name for name in _ISA if name in flags)


def _driver(text: str) -> str | None:
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return match[1] if match else None


def _driver_by_nvidia_smi() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.match(r"\d+(?:\.\d+)+$", said, re.MULTILINE)
    return match[0] if match else None


def _memory_limit() -> float:
    """The container's limit in bytes; infinity where it has none."""
    values = (_text(path).strip() for path in _CGROUP_LIMITS)
    return min((int(value) for value in values if value.isdigit()), default=float("inf"))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
