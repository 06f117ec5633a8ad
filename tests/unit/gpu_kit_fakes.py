"""Tiny wheels, a kit of them, and a machine with nothing but a fake torch."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import gpu_kit
import pip

TORCH = "2.11.0"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


def make_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    requires: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
    kind: str = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
) -> Path:
    """A wheel of pure Python whose module has the distribution's name and ``__version__``."""
    folder.mkdir(parents=True, exist_ok=True)
    module = name.replace("-", "_").replace(".", "_")
    files = files or {f"{module}/__init__.py": f"__version__ = {version!r}\n"}
    info = f"{module}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    everything = {
        **files,
        f"{info}/METADATA": "\n".join(lines) + "\n",
        f"{info}/WHEEL": kind,
        f"{info}/RECORD": "".join(f"{file},,\n" for file in files)
        + f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
    }
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in everything.items():
            wheel.writestr(zipfile.ZipInfo(file), text)
    return path


def real_pip(folder: Path) -> Path:
    """The pip that runs here, as a wheel that can be run."""
    package = Path(pip.__file__).parent
    path = folder / f"pip-{pip.__version__}-py3-none-any.whl"
    info = f"pip-{pip.__version__}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in sorted(package.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                wheel.write(file, Path("pip") / file.relative_to(package))
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: pip\nVersion: {pip.__version__}\n")
    return path


def make_sdist(folder: Path, name: str, version: str, tag: str = "py3-none-any") -> Path:
    """Sources that build a wheel by themselves, without anything from elsewhere."""
    module = name.replace("-", "_")
    wheel = make_wheel(folder / "inside", name, version)
    backend = (
        "import pathlib, shutil\n"
        f"def build_wheel(folder, config_settings=None, metadata_directory=None):\n"
        f"    name = '{module}-{version}-{tag}.whl'\n"
        "    shutil.copy(pathlib.Path(__file__).with_name('prebuilt'), pathlib.Path(folder) / name)\n"
        "    return name\n"
    )
    project = "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
    inside = {
        "PKG-INFO": f"Metadata-Version: 2.2\nName: {name}\nVersion: {version}\n".encode(),
        "pyproject.toml": f"{project}[project]\nname = '{name}'\nversion = '{version}'\n".encode(),
        "backend.py": backend.encode(),
        "prebuilt": wheel.read_bytes(),
    }
    wheel.unlink()
    wheel.parent.rmdir()
    path = folder / f"{module}-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for file, content in inside.items():
            entry = tarfile.TarInfo(f"{module}-{version}/{file}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def make_house(folder: Path, **versions: str) -> Path:
    """A folder of the wheels that every kit has: verl asks for ray, vllm for torch."""
    requires = {
        "verl": ["ray>=1"],
        "vllm": [f"torch=={TORCH}", "nvidia-cublas"],
        "verl-fp16": ["packaging>=20; extra == 'x'"],
    }
    for name in ("ray", "verl", "verl-fp16", "vllm", "pip"):
        make_wheel(folder, name, versions.get(name, "1.0"), requires.get(name, ()))
    return folder


def pack(house: Path, output: Path, *options: str, piece: float = 0.0015) -> Path:
    """The command, from the folder ``house`` alone."""
    command = ["pack", "--output", str(output), "--wheels", str(house), "--offline", "--piece-mb", str(piece)]
    code = gpu_kit.main([*command, "--python", PYTHON, "--glibc", "2.10", *options])
    assert code == 0
    return output


def fake_torch(version: str, gpu: bool = True) -> str:
    """The source of a torch that says of itself what the check asks, its label telling what it is built for."""
    cuda = f"{label[2:-1]}.{label[-1]}" if (label := version.partition("+")[2]).startswith("cu") else None
    return (
        f"__version__ = {version!r}\nclass version:\n    cuda = {cuda!r}\n"
        f"class cuda:\n    is_available = staticmethod(lambda: {gpu})\n"
    )


def make_machine(folder: Path, torch: str = f"{TORCH}+cu130", gpu: bool = True, **more: str) -> Path:
    """The Python of a new environment without pip that has a fake torch, and more packages with these versions."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    for name, version in {"torch": torch, **more}.items():
        (packages / name).mkdir()
        source = fake_torch(version, gpu) if name == "torch" else f"__version__ = {version!r}\n"
        (packages / name / "__init__.py").write_text(source)
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text(
            f"{name}/__init__.py,,\n{info.name}/METADATA,,\n{info.name}/INSTALLER,,\n{info.name}/RECORD,,\n"
        )
    return folder / "bin" / "python"
