"""The machine that a kit is to be installed on: whether it is the one that the kit was packed for."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpu_kit_there.common import FAILED, KitError, Progress, megabytes, same_version
from gpu_kit_there.manifest import Kit

CHECK_LIMIT = 900.0  # seconds that the imports may take; a cold disk makes them slow


@dataclass(frozen=True)
class Torch:
    """What a torch says of itself.

    Args:
        version: as in 2.11.0+cu130.
        cuda: what it was built for, as in 13.0; None without.
        gpu: whether it sees a GPU.
    """

    version: str
    cuda: str | None
    gpu: bool


def refuse_another_machine(kit: Kit) -> None:
    found = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "machine": platform.machine()}
    for key, version in found.items():
        if version != kit.target[key]:
            raise KitError(f"this is {key} {version}, and the kit is for {kit.target[key]}: nothing was changed")
    library, version = platform.libc_ver()
    if library == "glibc" and _numbers(version) < _numbers(kit.target["glibc"]):
        raise KitError(f"this is glibc {version}, and the kit needs {kit.target['glibc']}: nothing was changed")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def refuse_another_torch(kit: Kit, found: Torch) -> None:
    if not same_version(kit.torch, found.version):
        raise KitError(
            f"torch {found.version} is here, and the kit was packed for torch {kit.torch}: nothing was changed. Pack "
            f"one with --torch {found.version.split('+')[0]} and a vLLM that goes with it"
        )
    if kit.cuda and (found.cuda or "").split(".")[0] != kit.cuda:
        raise KitError(
            f"torch {found.version} here is built {f'for CUDA {found.cuda}' if found.cuda else 'without CUDA'}, and "
            f"the kit's vllm for CUDA {kit.cuda}: nothing was changed. vLLM needs a torch for the same CUDA: run this "
            "with a Python that has one, or pack a kit of a vLLM that goes with this one"
        )


def refuse_other_packages(kit: Kit) -> None:
    """What the kit leaves out has to be here in the version it was left out for."""
    told = []
    for name, wanted in sorted(kit.there.items()):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            told.append(f"{name} {wanted} (not here)")
            continue
        if not same_version(wanted.split("+")[0], found):
            told.append(f"{name} {wanted} (here: {found})")
    if told:
        raise KitError(
            f"the kit leaves out what another machine had: {', '.join(told)}. Nothing was changed. Pack it again with "
            "this machine's list (pip list --format=json) as --present"
        )


def require_room(place: Path, needed: int) -> None:
    """
    Raises:
        KitError: the disk that ``place`` is on, or will be, has fewer bytes left.
    """
    there_already = next(folder for folder in (place, *place.parents) if folder.is_dir())
    if (free := shutil.disk_usage(there_already).free) < needed:
        raise KitError(
            f"{place}: {megabytes(needed)} are needed, and {megabytes(free)} are free: nothing was installed", FAILED
        )


def torch_facts(python: str, folder: Path, wanted: str) -> Torch:
    """What the torch says of itself that this Python has."""
    log = folder / "torch.log"
    code = "import torch; print('gpu-kit', torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    failed = run_telling([python, "-c", code], folder, log, Progress("importing torch", 0))
    output = log.read_text(errors="replace")
    log.unlink()
    match = re.search(r"^gpu-kit (\S+) (\S+) (True|False)$", output, re.M)
    if failed or not match:
        reason = last_line(output)
        raise KitError(f"{python} cannot import torch, and the kit needs torch {wanted} there: {reason}")
    return Torch(match[1], None if match[2] == "None" else match[2], match[3] == "True")


def last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no word why"])[-1]


def run_telling(
    command: list[str], folder: Path, log: Path, progress: Progress, environment: dict[str, str] | None = None
) -> int:
    """Run with the output in ``log``; the exit code. Neither an interrupt nor the time limit leaves it running."""
    end = time.monotonic() + CHECK_LIMIT
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    raise KitError(f"this took longer than {CHECK_LIMIT:.0f} s: {' '.join(command[:3])}", FAILED)
                time.sleep(0.05)
                progress.tell()
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    return process.returncode
