"""A carry kit installs without a network, over a torch that stays as it is, or changes nothing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import gpu_kit
import gpu_kit_wheels
import pytest
from gpu_kit_fakes import TORCH, fake_torch, make_house, make_machine, make_wheel, pack, real_pip
from gpu_kit_there import commands, common, installation
from gpu_kit_there import machine as machines

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of tiny wheels, one of which needs another, and the real pip; packed, carried and joined. Not changed."""
    folder = tmp_path_factory.mktemp("joined")
    return carried(make_house(folder / "house"), folder)


def carried(house: Path, folder: Path, *options: str) -> Path:
    for old in house.glob("pip-*.whl"):
        old.unlink()
    real_pip(house)
    packed = pack(house, folder / "packed", *options, piece=1.0)
    assert commands.main(["collect", str(packed), "--kit", str(folder / "kit")]) == 0
    assert commands.main(["join", "--kit", str(folder / "kit")]) == 0
    return folder / "kit"


@pytest.fixture
def kit(joined: Path, tmp_path: Path) -> Path:
    return shutil.copytree(joined, tmp_path / "kit")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not changed."""
    return make_machine(tmp_path_factory.mktemp("machine"), transformers="5.17.0")


def install(python: Path, kit: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script as it travels, run by the machine's own Python, with pip's settings against it."""
    script = kit / gpu_kit.SCRIPT
    gpu_kit.write_script(script)
    command = [python, script, "install", "--kit", kit, *options]
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    against = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_REQUIRE_VIRTUALENV": "0",
        "PIP_TARGET": str(kit / "else"),
    }
    return subprocess.run(command, capture_output=True, text=True, env={**own, **against, **environment})


def says(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout.strip()


def listing(folder: Path) -> dict[Path, int]:
    """When each file was written; a folder's own time is 0, since Python's bytecode beside a module changes it."""
    kept = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path: 0 if path.is_dir() else path.stat().st_mtime_ns for path in kept}


def test_into_a_venv_beside_the_torch_of_another_venv(kit, machine):
    before = listing(machine.parent.parent)
    process = install(machine, kit)
    assert process.returncode == 0, process.stderr
    python = kit / "venv" / "bin" / "python"
    table = [line.split() for line in process.stdout.splitlines()]
    for row in (["ray", "1.0", "1.0"], ["verl_fp16", "1.0", "1.0"], ["torch", TORCH, f"{TORCH}+cu130"]):
        assert row in table
    assert f"use it with: {python}" in process.stdout
    code = "import torch, verl, ray, transformers; print(torch.__version__, torch.__file__, verl.__file__)"
    version, torch, verl = says(python, code).split()
    assert version == f"{TORCH}+cu130"
    assert Path(torch).is_relative_to(machine.parent.parent)
    assert Path(verl).is_relative_to(kit / "venv")
    assert listing(machine.parent.parent) == before
    assert not (kit / "else").exists()
    assert not list(kit.glob("*.log"))
    assert "pip" not in {path.name for path in (kit / "venv").glob("lib/python*/site-packages/*")}

    again = install(machine, kit)
    assert again.returncode == 0
    assert "holds this kit already" in again.stdout
    assert ["ray", "1.0", "1.0"] in [line.split() for line in again.stdout.splitlines()]


def test_what_the_kit_carries_comes_before_what_is_there(tmp_path, machine):
    make_wheel(make_house(tmp_path / "house"), "transformers", "5.9.0")
    kit = carried(tmp_path / "house", tmp_path)
    assert install(machine, kit, "--venv", str(tmp_path / "here")).returncode == 0
    code = "import transformers, importlib.metadata as m; print(transformers.__version__, m.version('transformers'))"
    assert says(tmp_path / "here" / "bin" / "python", code) == "5.9.0 5.9.0"
    assert says(machine, code) == "5.17.0 5.17.0"


def test_into_the_running_python(tmp_path):
    make_wheel(make_house(tmp_path / "house"), "transformers", "5.9.0")
    kit = carried(tmp_path / "house", tmp_path)
    python = make_machine(tmp_path / "machine", transformers="5.17.0")
    process = install(python, kit, "--target", "running")
    assert process.returncode == 0, process.stderr
    code = "import torch, transformers, verl, ray; print(torch.__version__, transformers.__version__, verl.__version__)"
    assert says(python, code) == f"{TORCH}+cu130 5.9.0 1.0"
    assert not (kit / "venv").exists()
    process = install(python, kit, "--target", "running", "--venv", str(tmp_path / "x"))
    assert process.returncode == common.WRONG_INPUT
    assert "--venv has no effect with --target running" in process.stderr


@pytest.mark.parametrize(("target", "torch"), [("venv", "2.10.0+cu130"), ("running", "2.10.0"), ("venv", "2.11.01")])
def test_another_torch_is_refused_before_anything_is_changed(kit, tmp_path, target, torch):
    python = make_machine(tmp_path / "machine", torch)
    before, own = listing(tmp_path / "machine"), listing(kit).keys()
    process = install(python, kit, "--target", target)
    assert process.returncode == common.WRONG_INPUT
    assert process.stderr.startswith(f"gpu-kit: torch {torch} is here, and the kit was packed for torch {TORCH}")
    assert process.stderr.count("\n") == 1
    assert listing(tmp_path / "machine") == before
    assert listing(kit).keys() == own | {kit / "gpu_kit_there.pyz"}


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A kit whose vLLM has an extension for CUDA 13 with this source."""

    def make(source: str) -> Path:
        house = make_house(tmp_path / "house")
        make_wheel(house, "vllm", files={"vllm/__init__.py": "", "vllm/_C_new.py": source})
        monkeypatch.setattr(gpu_kit_wheels, "extensions_of", lambda _: (("vllm._C_new",), "13"))
        return carried(house, tmp_path)

    return make


@pytest.mark.parametrize(
    ("torch", "built"), [("cpu", "without CUDA"), ("cu126", "for CUDA 12.6"), ("rocm7.2", "without CUDA")]
)
def test_a_torch_for_another_cuda_than_vllms_is_refused(compiled, tmp_path, torch, built):
    kit = compiled("")
    process = install(make_machine(tmp_path / "machine", f"{TORCH}+{torch}"), kit)
    assert process.returncode == common.WRONG_INPUT
    assert f"torch {TORCH}+{torch} here is built {built}, and the kit's vllm for CUDA 13" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not (kit / "venv").exists()


def test_an_extension_of_vllm_that_does_not_load_is_a_failure(compiled, tmp_path):
    kit = compiled("raise ImportError('libcudart.so.13: cannot open shared object file')")
    process = install(make_machine(tmp_path / "machine"), kit)
    assert process.returncode == common.FAILED
    assert "vllm._C_new does not load: ImportError: libcudart.so.13: cannot open shared object file" in process.stderr
    assert ["vllm", "1.0", "1.0"] in [line.split() for line in process.stdout.splitlines()]


@pytest.mark.parametrize("source", ("", "raise ImportError('libcuda.so.1: cannot open shared object file')"))
def test_without_a_gpu_that_is_seen_an_extension_that_does_not_load_is_a_warning(compiled, tmp_path, source):
    """The driver's library is not there where the GPU is not."""
    process = install(make_machine(tmp_path / "machine", gpu=False), compiled(source))
    assert process.returncode == 0, process.stderr
    assert "warning: torch sees no GPU here" in process.stderr
    assert ("vllm._C_new does not load: ImportError: libcuda.so.1" in process.stderr) == bool(source)


def test_with_a_gpu_and_an_extension_that_loads_there_is_no_warning(compiled, tmp_path):
    process = install(make_machine(tmp_path / "machine"), compiled("assert __import__('sys').modules['torch']"))
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize(
    ("wanted", "found", "fits"),
    [
        ("2.11.0", "2.11.0", True),
        ("2.11.0", "2.11.0+cu130", True),
        ("2.11.0+cu130", "2.11.0+cu130", True),
        ("2.11.0+cu130", "2.11.0+cu129", False),
        ("2.11.0+cu130", "2.11.0", False),
        ("2.11.0", "2.11.1+cu130", False),
    ],
)
def test_a_local_label_counts_only_where_it_is_asked_for(wanted, found, fits):
    assert common.same_version(wanted, found) == fits


def test_a_torch_that_does_not_import_is_told(kit, tmp_path):
    python = make_machine(tmp_path / "machine")
    next((tmp_path / "machine").glob("lib/python*/site-packages/torch/__init__.py")).write_text("import no_driver\n")
    process = install(python, kit)
    assert process.returncode == common.WRONG_INPUT
    assert f"cannot import torch, and the kit needs torch {TORCH} there" in process.stderr
    assert "No module named 'no_driver'" in process.stderr
    assert not (kit / "venv").exists()


def test_another_python_machine_or_libc_is_refused(joined, monkeypatch, capsys):
    for name, value, told in (
        ("machine", lambda: "aarch64", "this is machine aarch64, and the kit is for x86_64"),
        ("libc_ver", lambda: ("glibc", "2.9"), "this is glibc 2.9, and the kit needs 2.10"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(platform, name, value)
            assert commands.main(["install", "--kit", str(joined)]) == common.WRONG_INPUT
        assert told in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 9, 1))
        assert commands.main(["install", "--kit", str(joined)]) == common.WRONG_INPUT
    assert "this is python 3.9, and the kit is for 3." in capsys.readouterr().err


def test_what_was_left_out_has_to_be_there(tmp_path):
    house = make_house(tmp_path / "house")
    make_wheel(house, "numpy", "2.3.5")
    make_wheel(house, "verl", requires=["numpy>=2", "ray"])
    present = tmp_path / "present.json"
    present.write_text(
        json.dumps([{"name": "torch", "version": "2.11.0+cu130"}, {"name": "NumPy", "version": "2.3.5"}])
    )
    kit = carried(house, tmp_path, "--present", str(present))
    assert not list((kit / "wheels").glob("numpy*"))
    for found, told in (({}, "numpy 2.3.5 (not here)"), ({"numpy": "2.4.0"}, "numpy 2.3.5 (here: 2.4.0)")):
        python = make_machine(tmp_path / f"machine-{len(found)}", **found)
        process = install(python, kit)
        assert process.returncode == common.WRONG_INPUT
        assert f"the kit leaves out what another machine had: {told}. Nothing was changed" in process.stderr
        assert not (kit / "venv").exists()
    assert install(make_machine(tmp_path / "machine", numpy="2.3.5"), kit).returncode == 0


def test_wheels_that_are_not_whole_are_not_installed(kit, machine):
    wheel = kit / "wheels" / "ray-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"x")
    process = install(machine, kit)
    assert process.returncode == common.INCOMPLETE
    assert "ray-1.0-py3-none-any.whl is not there as it was packed: run join first" in process.stderr
    assert commands.main(["join", "--kit", str(kit)]) == 0
    assert install(machine, kit).returncode == 0


@pytest.mark.parametrize("target", ("venv", "running"))
def test_too_little_room_is_told_before_anything_is_changed(kit, monkeypatch, capsys, target):
    """Room for the wheels as they are unpacked."""
    monkeypatch.setattr(installation, "torch_facts", lambda *_: machines.Torch(TORCH, "13.0", True))
    monkeypatch.setattr(installation, "_install_wheels", lambda *_: pytest.fail("it installs"))
    unpacked = 0
    for wheel in (kit / "wheels").iterdir():
        with zipfile.ZipFile(wheel) as archive:
            unpacked += sum(file.file_size for file in archive.infolist())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, unpacked - 1))
    before = listing(kit)
    assert commands.main(["install", "--kit", str(kit), "--target", target]) == common.FAILED
    assert f"{unpacked / 1e6:,.1f} MB are needed, and " in capsys.readouterr().err
    assert listing(kit) == before


def test_when_pip_fails_the_venv_is_gone_again(tmp_path, machine):
    house = make_house(tmp_path / "house")
    make_wheel(house, "verl", requires=["ray"], kind="Wheel-Version: 9.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    kit = carried(house, tmp_path)
    process = install(machine, kit)
    assert process.returncode == common.FAILED
    assert "pip could not install" in process.stderr
    assert "Wheel-Version (9.0) is not compatible" in process.stderr, "pip's own words"
    assert not (kit / "venv").exists()


def test_a_wheel_that_brings_another_torch_is_found_out(tmp_path, machine):
    house = make_house(tmp_path / "house")
    files = {"ray/__init__.py": "", "torch/__init__.py": fake_torch("2.13.0+cu130")}
    make_wheel(house, "ray", files=files)
    process = install(machine, carried(house, tmp_path))
    assert process.returncode == common.FAILED
    assert f"torch was {TORCH}+cu130 and is 2.13.0+cu130" in process.stderr


def test_an_import_that_fails_is_shown_and_the_next_installation_starts_anew(tmp_path, machine):
    house = make_house(tmp_path / "house")
    make_wheel(house, "verl", requires=["ray"], files={"verl/__init__.py": "import ray, of_nowhere\n"})
    kit = carried(house, tmp_path)
    process = install(machine, kit)
    assert process.returncode == common.FAILED
    assert ["verl", "1.0", "does", "not", "import"] in [line.split() for line in process.stdout.splitlines()]
    assert "No module named 'of_nowhere'" in process.stderr
    assert "No module named 'of_nowhere'" in (kit / "check.log").read_text()
    (kit / "venv" / "stale").touch()
    assert install(machine, kit).returncode == common.FAILED
    assert not (kit / "venv" / "stale").exists()


def test_another_version_on_the_path_is_told(kit, machine, tmp_path):
    (tmp_path / "first" / "ray-7.0.dist-info").mkdir(parents=True)
    (tmp_path / "first" / "ray-7.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: ray\nVersion: 7.0\n"
    )
    process = install(machine, kit, PYTHONPATH=str(tmp_path / "first"))
    assert process.returncode == common.FAILED
    assert "another version comes first on the path (PYTHONPATH?): ray" in process.stderr


def test_a_folder_that_is_something_else_is_left_alone(kit, machine, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    process = install(machine, kit, "--venv", str(tmp_path / "mine"))
    assert process.returncode == common.WRONG_INPUT
    assert "mine is there and no venv of a kit: remove it, or name another folder with --venv" in process.stderr
    (tmp_path / "mine" / "gpu-kit.json").write_text('{"kit": "0123456789abcdef"}')
    process = install(machine, kit, "--venv", str(tmp_path / "mine"))
    assert process.returncode == common.WRONG_INPUT
    assert "holds another kit" in process.stderr
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_an_interrupt_while_pip_runs_leaves_neither_a_venv_nor_a_process(kit, monkeypatch, capsys):
    monkeypatch.setattr(installation, "torch_facts", lambda *_: machines.Torch(TORCH, "13.0", True))
    started = []

    class Interrupted(subprocess.Popen):
        def poll(self):
            if self not in started:
                started.append(self)
                raise KeyboardInterrupt
            return super().poll()

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    monkeypatch.setattr(installation, "_show_what_is_here", lambda *_: None)
    assert commands.main(["install", "--kit", str(kit)]) == common.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert not (kit / "venv").exists()
    assert [process.returncode is not None for process in started] == [True]


def test_what_runs_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "CHECK_LIMIT", 0.2)
    monkeypatch.setattr(common, "TELL_EVERY", 0.0)
    with pytest.raises(common.KitError, match="this took longer than 0 s: sleep 60"):
        machines.run_telling(["sleep", "60"], tmp_path, tmp_path / "log", common.Progress("sleeping", 0))
