"""Which wheels a carry kit needs, and getting them: resolved by uv, downloaded and built by pip."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email import message_from_bytes
from pathlib import Path
from typing import IO

import gpu_kit_pins as pins
import setup_env
from gpu_kit_there.common import KitError, Progress, normalized, same_version
from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ".fetching-"
AT_ONCE = 12  # packages that one call of pip fetches; what it had of them is lost when it is interrupted


@dataclass(frozen=True)
class Wanted:
    """The machine that the kit goes to.

    Args:
        python: such as 3.12.
        torch: the version that is there.
        vllm: the version to carry.
        glibc: the oldest one that has to do.
        present: what is there beside: name -> version. Empty where that is not known.
        without: packages that are not carried though something asks for them.
    """

    python: str
    torch: str
    vllm: str
    glibc: str = pins.GLIBC
    present: Mapping[str, str] = field(default_factory=dict)
    without: frozenset[str] = frozenset()

    @property
    def platforms(self) -> list[str]:
        """pip's names of the platforms whose wheels run there, the newest first; pip takes each for itself alone."""
        newest = int(self.glibc.split(".")[1])
        older = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64")
        return [*(f"manylinux_2_{minor}_x86_64" for minor in range(newest, 4, -1)), *older]

    @property
    def marker_environment(self) -> dict[str, str]:
        return {
            **default_environment(),
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": "x86_64",
        }


@dataclass(frozen=True)
class Built:
    """A wheel on this machine, with what its metadata say."""

    file: Path
    name: str
    version: str
    requires: tuple[Requirement, ...]


def read_present(file: Path) -> dict[str, str]:
    """The output of ``pip list --format=json`` or ``pip freeze``: normalized name -> version.

    Raises:
        KitError: it is neither.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"--present {file}: {error}") from None
    try:
        if text.lstrip().startswith("["):
            pairs = [(row["name"], row["version"]) for row in json.loads(text)]
        else:
            pairs = [line.split("==", 1) for line in map(_frozen, text.splitlines()) if "==" in line]
        found = {normalized(name): str(Version(version)) for name, version in pairs}
    except (ValueError, KeyError, TypeError, InvalidVersion) as error:
        raise KitError(f"--present {file}: this is not what pip list --format=json prints: {error!r}") from None
    if not found:
        raise KitError(f"--present {file}: there is no package in it; make it with pip list --format=json")
    return found


def _frozen(line: str) -> str:
    """A line of pip freeze; of the comment above a package that is installed from a folder, what it says of that."""
    if not line.lstrip().startswith("#"):
        return line.strip()
    editable = re.match(r"# Editable [^(]*\((\S+)\)", line)
    return editable[1] if editable else ""


def read_wheel(file: Path) -> Built:
    """
    Raises:
        KitError: it is no wheel, or a broken one.
    """
    try:
        name, version = parse_wheel_filename(file.name)[:2]
        with zipfile.ZipFile(file) as archive:
            inside = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
            metadata = message_from_bytes(archive.read(inside))
        requires = tuple(map(Requirement, metadata.get_all("Requires-Dist") or []))
    except (InvalidWheelFilename, InvalidRequirement, zipfile.BadZipFile, StopIteration) as error:
        raise KitError(f"{file} is no whole wheel ({error!r}): remove it and pack again") from None
    return Built(file, normalized(name), str(version), requires)


def extensions_of(wheel: Path) -> tuple[tuple[str, ...], str | None]:
    """vLLM's compiled modules that its platform for CUDA loads first, and the major version of their CUDA.

    The one is ``vllm._C`` or has a name that begins so; ``import vllm`` does not load it. The other is None where they
    name no runtime library of CUDA, or several.
    """
    modules, majors = [], set()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if match := re.fullmatch(r"vllm/(_C\w*)(\.[\w-]+)?\.so", name):
                modules.append(f"vllm.{match[1]}")
                with archive.open(name) as library:
                    majors |= _cuda_runtimes(library)
    return tuple(sorted(modules)), majors.pop() if len(majors) == 1 else None


def _cuda_runtimes(library: IO[bytes]) -> set[str]:
    """Major versions of libcudart that are named in a compiled module."""
    found: set[bytes] = set()
    end = b""
    while block := library.read(1 << 20):
        found.update(re.findall(rb"libcudart\.so\.(\d+)\0", end + block))
        end = block[-32:]
    return {major.decode() for major in found}


def requirements(ours: Built, wanted: Wanted) -> list[str]:
    """What is asked for beside ``ours`` itself: its own extras, with torch and vLLM for a GPU."""
    asked = [f"vllm=={wanted.vllm}", f"torch=={_public(wanted.torch)}", "pip", *pins.REQUIREMENTS]
    for line in ours.requires:
        applies = [extra for extra in ("", *pins.EXTRAS) if _applies(line, extra, wanted)]
        if applies and normalized(line.name) not in pins.CPU_ONLY:
            asked.append(f"{line.name}{_extras(line)}{line.specifier}")
    return asked


def _extras(line: Requirement) -> str:
    return f"[{','.join(sorted(line.extras))}]" if line.extras else ""


def _applies(line: Requirement, extra: str, wanted: Wanted) -> bool:
    return line.marker is None or line.marker.evaluate({**wanted.marker_environment, "extra": extra})


def resolve(asked: Iterable[str], wanted: Wanted) -> dict[str, str]:
    """Every package that is needed there, those that are there included: name -> version.

    What is there is kept where it satisfies; torch is always the one that is there.

    Raises:
        KitError: uv found no solution; in uv's own words.
    """
    settings = pip_settings()
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-platform", f"x86_64-manylinux_{wanted.glibc.replace('.', '_')}"]
    command += ["--python-version", wanted.python, "--only-binary", ":all:"]
    command += [option for name in pins.SOURCE_ONLY for option in ("--no-binary", name)]
    command += [option for link in setup_env.find_links(settings) for option in ("--find-links", link)]
    command += ["--no-index"] if settings.get("no-index", "").lower() in setup_env.TRUE else setup_env.indexes(settings)
    environment = {**setup_env.uv_environment(settings, os.environ), "UV_PYTHON_DOWNLOADS": "never"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "asked.in").write_text("".join(f"{line}\n" for line in asked))
        (folder / "constraints.txt").write_text(f"torch=={_public(wanted.torch)}\n")
        output = folder / "resolved.txt"  # uv prefers the versions that it finds in there
        output.write_text("".join(f"{name}=={version}\n" for name, version in _preferred(wanted)))
        command += ["--constraints", "constraints.txt", "--output-file", output.name, "asked.in"]
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if process.returncode:
            raise KitError(
                f"the packages cannot be resolved: {process.stderr.strip()}\nWhere a package has no usable wheel, a "
                "newer --glibc or another --vllm may help, or to take it out of the --present list; one of pure "
                "Python can be named in scripts/gpu_kit_pins.py"
            )
        lines = [line.split(" ;")[0].strip() for line in output.read_text().splitlines()]
    return {normalized(name): version for name, version in (line.split("==", 1) for line in lines if "==" in line)}


def _preferred(wanted: Wanted) -> list[tuple[str, str]]:
    """What is there. Not what comes with torch, which torch pins itself: of a preferred version uv looks at the first
    index that has it alone, and fails if the wheels in there are for another Python."""
    return [(name, _public(v)) for name, v in sorted(wanted.present.items()) if not comes_with_torch(name)]


def _public(version: str) -> str:
    """Without the local label (+cu130), which the indexes do not have."""
    return version.split("+")[0]


def held_back(wanted: Wanted) -> frozenset[str]:
    """What is left to the torch that is there: see :data:`gpu_kit_pins.WITH_TORCH`."""
    return frozenset(filter(comes_with_torch, resolve([f"torch=={_public(wanted.torch)}"], wanted)))


def pip_settings() -> dict[str, str]:
    """pip's own settings, so that uv looks where pip would look."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    return setup_env.parse_settings(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def comes_with_torch(name: str) -> bool:
    return name in pins.WITH_TORCH or name.startswith(pins.WITH_TORCH_PREFIX)


def is_there(name: str, version: str, wanted: Wanted) -> bool:
    found = wanted.present.get(name)
    return found is not None and same_version(version, found) and name != "pip"


def _scratch(folder: Path) -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH)


def own_wheel(folder: Path) -> Path:
    """Build this package's wheel into ``folder``, in the place of older ones."""
    for old in folder.glob("verl_fp16-*.whl"):
        old.unlink()
    return _build([str(ROOT), "--no-build-isolation"], "verl-fp16", folder)


def _build(arguments: Sequence[str], name: str, folder: Path) -> Path:
    """The same sources give the same wheel: the times in it are fixed.

    Raises:
        KitError: it cannot be built, or has compiled parts, which would be for this machine.
    """
    environment = {"SOURCE_DATE_EPOCH": "1577836800", **os.environ}
    with _scratch(folder) as scratch:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, *arguments]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if process.returncode or len(wheels) != 1:
            raise KitError(f"the wheel of {name} could not be built: {process.stderr.strip()}")
        if not wheels[0].name.endswith("-none-any.whl"):
            raise KitError(f"{name} has no wheel, and {wheels[0].name}, built here, would be for this machine alone")
        return wheels[0].rename(folder / wheels[0].name)


def fetch(packages: Mapping[str, str], wanted: Wanted, folder: Path) -> list[Path]:
    """The wheels of these packages in ``folder``; those that are there already are not fetched again."""
    for leftover in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(leftover)
    here = {(built.name, built.version): built.file for built in map(read_wheel, sorted(folder.glob("*.whl")))}
    done = {name: here[name, str(Version(v))] for name, v in packages.items() if (name, str(Version(v))) in here}
    progress = Progress("fetching", len(packages), "{:.0f} packages".format)
    progress.add(len(done))
    left = [name for name in sorted(packages) if name not in done]
    for name in [name for name in left if name in pins.SOURCE_ONLY]:
        left.remove(name)
        done[name] = _build([f"{name}=={packages[name]}", "--no-binary", name], name, folder)
        progress.add(1)
    for start in range(0, len(left), AT_ONCE):
        batch = {name: packages[name] for name in left[start : start + AT_ONCE]}
        done.update(_download(batch, wanted, folder))
        progress.add(len(batch))
    return [done[name] for name in sorted(done)]


def _download(packages: Mapping[str, str], wanted: Wanted, folder: Path) -> dict[str, Path]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--implementation", "cp", "--python-version", wanted.python]
    command += [option for platform in wanted.platforms for option in ("--platform", platform)]
    with _scratch(folder) as scratch:
        command += ["--dest", scratch, *(f"{name}=={version}" for name, version in packages.items())]
        process = subprocess.run(command, capture_output=True, text=True)
        fresh = {wheel.name: wheel.file for wheel in map(read_wheel, Path(scratch).glob("*.whl"))}
        if process.returncode or set(fresh) != set(packages):
            raise KitError(f"pip could not fetch one of {', '.join(packages)}: {process.stderr.strip()}")
        return {name: file.rename(folder / file.name) for name, file in fresh.items()}


def unmet(wheels: Sequence[Built], wanted: Wanted, held: Iterable[str]) -> list[str]:
    """What the wheels ask for that is neither among them nor there; one line for each."""
    have = {**wanted.present, **{wheel.name: wheel.version for wheel in wheels}, "torch": wanted.torch}
    let_go = {*held, *wanted.without}
    told = [f"it needs {name}" for name in ("pip", *pins.IMPORTS.values()) if name not in have]
    for wheel, line in _active(wheels, wanted):
        name = normalized(line.name)
        needs = f"{wheel.name} {wheel.version} needs {line.name}{line.specifier}"
        if name not in have:
            told += [f"{needs}, which is nowhere"] if name not in let_go else []
        elif not line.specifier.contains(have[name], prereleases=True):
            told.append(f"{needs}, and it is {have[name]}")
    return list(dict.fromkeys(told))


def _active(wheels: Sequence[Built], wanted: Wanted) -> list[tuple[Built, Requirement]]:
    """What counts there, with the extras that are asked for by what counts."""
    extras = {wheel.name: {""} for wheel in wheels}
    while True:
        active = [
            (wheel, line)
            for wheel in wheels
            for line in wheel.requires
            if any(_applies(line, extra, wanted) for extra in extras[wheel.name])
        ]
        before = sum(map(len, extras.values()))
        for _, line in active:
            extras.setdefault(normalized(line.name), {""}).update(line.extras)
        if sum(map(len, extras.values())) == before:
            return active
