"""Installing the joined wheels over the torch that is there, and the check of what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_kit_there.common import (
    FAILED,
    INCOMPLETE,
    KitError,
    Progress,
    normalized,
    same_version,
    sha256_of,
    table,
    taking_its_place,
)
from gpu_kit_there.machine import (
    Torch,
    last_line,
    refuse_another_machine,
    refuse_another_torch,
    refuse_other_packages,
    require_room,
    run_telling,
    torch_facts,
)
from gpu_kit_there.manifest import Kit, Wheel, read_manifest

UNFINISHED = ".gpu-kit-unfinished"
FINISHED = "gpu-kit.json"


def install(folder: Path, target: str, place: Path | None) -> int:
    """Install the joined wheels; torch stays what it is.

    Args:
        target: ``venv``, or ``running`` for the environment of the Python that runs this.
        place: where the venv goes; KIT/venv by default.

    Raises:
        KitError: before anything is changed, where this machine is not what the kit was packed for.
    """
    folder = folder.resolve()
    kit = read_manifest(folder / "manifest.json")
    refuse_another_machine(kit)
    before = torch_facts(sys.executable, folder, kit.torch)
    refuse_another_torch(kit, before)
    refuse_other_packages(kit)
    _require_wheels(kit, folder)
    needed = _unpacked_size(kit, folder)
    if target == "running":
        require_room(Path(sysconfig.get_path("purelib")), needed)
        _install_wheels(kit, folder, sys.executable)
        return _check(kit, folder, sys.executable, before)
    place = (place or folder / "venv").absolute()
    with _making_venv(place, kit, needed) as python:
        if python:
            _install_wheels(kit, folder, python)
    return _finish_venv(kit, folder, place, before)


def _require_wheels(kit: Kit, folder: Path) -> None:
    progress = Progress("checking the wheels", sum(wheel.size for wheel in kit.wheels))
    for wheel in kit.wheels:
        file = folder / "wheels" / wheel.name
        if not file.is_file() or sha256_of(file, progress) != wheel.sha256:
            raise KitError(f"{wheel.name} is not there as it was packed: run join first", INCOMPLETE)


def _unpacked_size(kit: Kit, folder: Path) -> int:
    size = 0
    for wheel in kit.wheels:
        with zipfile.ZipFile(folder / "wheels" / wheel.name) as archive:
            size += sum(file.file_size for file in archive.infolist())
    return size


@contextlib.contextmanager
def _making_venv(place: Path, kit: Kit, needed: int) -> Iterator[str | None]:
    """Yields the Python of a new venv, None where it is there already; on a failure it is gone again.

    Args:
        needed: bytes that go into it.
    """
    if (place / FINISHED).is_file():
        if json.loads((place / FINISHED).read_text()).get("kit") == kit.name:
            print(f"{place} holds this kit already")
            yield None
            return
        raise KitError(f"{place} holds another kit: remove it, or name another folder with --venv")
    if place.exists() and not (place / UNFINISHED).exists() and (not place.is_dir() or any(place.iterdir())):
        raise KitError(f"{place} is there and no venv of a kit: remove it, or name another folder with --venv")
    shutil.rmtree(place, ignore_errors=True)
    require_room(place, needed)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(shutil.rmtree, place, ignore_errors=True)
        place.mkdir(parents=True)
        (place / UNFINISHED).touch()
        venv.EnvBuilder(system_site_packages=True, with_pip=False, symlinks=True).create(place)
        python = str(place / "bin" / "python")
        _show_what_is_here(python, place)
        yield python
        on_failure.pop_all()


def _show_what_is_here(python: str, place: Path) -> None:
    """Where the Python that runs this is one of a venv, a venv made from it does not see its packages: only those of
    the Python below both. A .pth puts them behind the new venv's own."""
    code = "import json, sys; print(json.dumps(sys.path))"
    seen = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    paths = dict.fromkeys([*site.getsitepackages(), *sys.path])
    mine = [path for path in paths if Path(path).name in ("site-packages", "dist-packages")]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in mine if path not in seen]
    own = next(Path(path) for path in seen if Path(path).is_relative_to(place) and Path(path).name == "site-packages")
    (own / "_gpu_kit_base.pth").write_text("".join(lines))


def _install_wheels(kit: Kit, folder: Path, python: str) -> None:
    """In batches, with the kit's own pip, without its settings and without looking for dependencies."""
    wheels = [wheel for wheel in kit.wheels if wheel.name != kit.pip]
    options = ["--isolated", "--disable-pip-version-check", "install", "--no-index", "--no-deps", "--no-cache-dir"]
    options += ["--no-compile", "--no-warn-script-location", "--quiet"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    progress = Progress("installing", sum(wheel.size for wheel in wheels))
    log = folder / "install.log"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as unpacked:
        with zipfile.ZipFile(folder / "wheels" / kit.pip) as archive:
            archive.extractall(unpacked)
        for batch in _batches(wheels):
            files = [str(folder / "wheels" / wheel.name) for wheel in batch]
            if run_telling([python, f"{unpacked}/pip", *options, *files], folder, log, progress, environment):
                names = ", ".join(wheel.name for wheel in batch)
                raise KitError(f"pip could not install {names}:\n{log.read_text(errors='replace').rstrip()}", FAILED)
            log.unlink()
            progress.add(sum(wheel.size for wheel in batch))


def _batches(wheels: Sequence[Wheel], most: int = 16, size: int = 100_000_000) -> Iterator[list[Wheel]]:
    batch: list[Wheel] = []
    for wheel in wheels:
        if batch and (len(batch) == most or sum(w.size for w in batch) + wheel.size > size):
            yield batch
            batch = []
        batch.append(wheel)
    if batch:
        yield batch


def _finish_venv(kit: Kit, folder: Path, place: Path, before: Torch) -> int:
    code = _check(kit, folder, str(place / "bin" / "python"), before)
    if code == 0:
        with taking_its_place(place / FINISHED) as fresh:
            fresh.write_text(json.dumps({"kit": kit.name, "torch": before.version}))
        (place / UNFINISHED).unlink(missing_ok=True)
        print(f"use it with: {place}/bin/python")
    return code


def _check(kit: Kit, folder: Path, python: str, before: Torch) -> int:
    """torch as it was, every module imports in the kit's version, and vLLM's extensions load."""
    after = torch_facts(python, folder, kit.torch)
    if after.version != before.version:
        raise KitError(
            f"torch was {before.version} and is {after.version} for {python}: remove that environment", FAILED
        )
    code = (
        "import importlib, importlib.metadata as m\n"
        f"for module, name in {sorted(kit.imports.items())!r}:\n"
        "    importlib.import_module(module)\n"
        "    print('gpu-kit', module, m.version(name), flush=True)\n"
        "import torch\n"
        f"for module in {list(kit.extensions)!r}:\n"
        "    try:\n"
        "        importlib.import_module(module)\n"
        "    except ImportError as error:\n"
        "        print(f'gpu-kit-unloaded {module} does not load: ImportError: {error}', flush=True)\n"
    )
    log = folder / "check.log"
    failed = run_telling([python, "-c", code], folder, log, Progress("importing", 0))
    output = log.read_text(errors="replace")
    found = dict(re.findall(r"^gpu-kit (\S+) (\S+)$", output, re.M))
    carried = {wheel.distribution: wheel.version for wheel in kit.wheels} | kit.there
    rows = [
        (module, carried.get(normalized(name), "?"), found.get(module, "does not import"))
        for module, name in sorted(kit.imports.items())
    ]
    print(table(("module", "in the kit", "imported"), [*rows, ("torch", kit.torch, after.version)]))
    if failed:
        raise KitError(f"an import failed: {last_line(output)}\nall of it: {log}", FAILED)
    if others := [module for module, wanted, seen in rows if not same_version(wanted, seen)]:
        raise KitError(f"another version comes first on the path (PYTHONPATH?): {', '.join(others)}", FAILED)
    _judge_extensions(re.findall(r"^gpu-kit-unloaded (.*)$", output, re.M), after, log)
    log.unlink()
    return 0


def _judge_extensions(unloaded: Sequence[str], torch: Torch, log: Path) -> None:
    """Without a GPU that is seen, the driver's library may be missing, which an extension asks for."""
    if unloaded and torch.gpu:
        raise KitError(f"{'; '.join(unloaded)}\nall of it: {log}", FAILED)
    if not torch.gpu:
        told = "; ".join(["torch sees no GPU here, so that nothing was tried that needs one", *unloaded])
        print(f"gpu-kit: warning: {told}", file=sys.stderr)
