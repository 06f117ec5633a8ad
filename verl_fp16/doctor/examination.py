"""The doctor's round: read facts, look into child processes, judge."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_fp16 import __version__
from verl_fp16.cpu.choice import ENV_VAR, PLATFORM
from verl_fp16.doctor import checks
from verl_fp16.doctor.check import ERROR, Check, would_start
from verl_fp16.doctor.host import Host, read_host
from verl_fp16.doctor.packages import installed_versions, wanted_versions
from verl_fp16.installed import InstalledVerl, VerlNotFound, find_verl
from verl_fp16.launch import launch_environment
from verl_fp16.supervise import run_supervised

Announce = Callable[[str], object]


@dataclass(frozen=True)
class Examination:
    """What came out.

    Args:
        device: gpu or cpu, whichever a run would take.
        checks: the rows, in order.
    """

    device: str
    checks: tuple[Check, ...]

    @property
    def would_start(self) -> bool:
        return would_start(self.checks)


def examine(*, ray: bool = True, timeout_s: float = 180.0, announce: Announce = lambda _: None) -> Examination:
    """Look at this machine and environment; takes about half a minute, mostly imports in child processes.

    Args:
        ray: start a local Ray for a moment and look from one of its workers.
        timeout_s: for each child process.
        announce: called with what is being looked at.
    """
    environ = dict(os.environ)
    announce("torch and its devices, in a child process")
    devices = look("devices", environ, timeout_s)
    device = "gpu" if devices.get("gpus") else "cpu"
    announce("versions and machine")
    verl, problem = _find_verl()
    rows = guarded("versions", lambda: _versions(verl, problem, device))
    rows += guarded("machine", lambda: _machine(devices, device, read_host()))
    if verl is not None:
        rows += guarded("plugin", lambda: _inside(verl, device, environ, ray, timeout_s, announce))
    return Examination(device, tuple(rows))


def guarded(name: str, make: Callable[[], list[Check]]) -> list[Check]:
    """The rows that ``make`` returns, or one that says why it could not."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001  a machine that breaks a check is what the doctor is there to describe
        return [Check(name, ERROR, f"the check failed: {type(error).__name__}: {error}", fix="report it")]


def _versions(verl: InstalledVerl | None, problem: str, device: str) -> list[Check]:
    versions = installed_versions()
    wanted = wanted_versions(device, verl.version if verl else "")
    return [
        checks.check_python(platform.python_version()),
        checks.check_verl(verl, problem),
        *(checks.check_package(name, versions[name], wanted.get(name)) for name in ("torch", "ray", "transformers")),
        checks.check_vllm(versions, wanted, device),
    ]


def _machine(devices: Mapping[str, Any], device: str, host: Host) -> list[Check]:
    return [
        checks.check_device(devices, host),
        *checks.check_gpus(devices, host),
        *([checks.check_cpu(host)] if device == "cpu" else ()),
        checks.check_memory(host, device),
        checks.check_shared_memory(host, device),
        checks.check_open_files(host),
    ]


def _find_verl() -> tuple[InstalledVerl | None, str]:
    try:
        return find_verl(), ""
    except VerlNotFound as error:
        return None, str(error)


def _inside(
    verl: InstalledVerl, device: str, environ: Mapping[str, str], ray: bool, timeout_s: float, announce: Announce
) -> list[Check]:
    """The rows for what verl's processes look like from inside, in the environment that a run would have."""
    notes = [checks.check_launcher(verl, environ), checks.check_cpu_room(verl) if device == "cpu" else None]
    rows = [note for note in notes if note is not None]
    environ = {**environ, **launch_environment(verl, environ)}
    if device == "cpu" and verl.has_platforms:
        environ[ENV_VAR] = PLATFORM
    announce("`import verl` and every hook, in a child process")
    inside = look("plugin", environ, timeout_s)
    rows += [checks.check_plugin(inside, environ, verl), *checks.check_hooks(inside)]
    if ray:
        announce("a worker of a local Ray")
        rows.append(checks.check_ray_worker(look("ray", environ, timeout_s), environ, verl, __version__))
    return rows


def look(section: str, environ: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
    """Run a section of :mod:`verl_fp16.doctor.probe`; ``{"failed": why}`` where it gave no answer.

    Nothing that it starts outlives it, also when it hangs or dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer, empty = Path(folder, "answer.json"), Path(folder, "shm")
        empty.mkdir()
        try:
            result = run_supervised(
                [sys.executable, "-m", "verl_fp16.doctor.probe", section, str(answer)],
                log_path=Path(folder, "log"),
                env=environ,
                timeout_s=timeout_s,
                critical=(),
                end_grace_s=4.0,
                poll_s=0.1,
                # A probe leaves no shared memory, and another run's is none of the doctor's business.
                shm_dir=empty,
            )
            if result.ok:
                return json.loads(answer.read_text())
        except (OSError, ValueError) as error:
            return {"failed": f"{type(error).__name__}: {error}"}
        return {"failed": " ".join((result.cause or "").split())}
