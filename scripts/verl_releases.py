#!/usr/bin/env python3
"""The wheels of every supported verl, unpacked side by side under ``.venv/verl-releases/<version>``.

``make setup`` fetches them; tests and the source patches read them. Uses nothing but the standard library and pip, with
pip's own settings.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASES = ROOT / ".venv" / "verl-releases"

sys.path.insert(0, str(ROOT))
from verl_fp16.releases import SUPPORTED_VERL  # noqa: E402  this script also runs where the package is not installed

sys.path.pop(0)


class ReleaseNotFetched(RuntimeError):
    """pip did not find the wheel of a release; the message has pip's own words and the way out."""


def release_folder(version: str, *, folder: Path = RELEASES, python: str = sys.executable) -> Path:
    """Where the unpacked wheel of ``version`` lies; fetched first if it is not there.

    Args:
        version: one of :data:`SUPPORTED_VERL`.
        folder: where the unpacked releases are kept.
        python: an interpreter with pip.

    Raises:
        ValueError: the version is not supported.
        ReleaseNotFetched: pip could not download the wheel.
    """
    if version not in SUPPORTED_VERL:
        raise ValueError(f"verl {version} is not one of the supported releases: {', '.join(SUPPORTED_VERL)}")
    release = folder / version
    if not release.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unpacked = Path(scratch) / "unpacked"
            with zipfile.ZipFile(_download(version, Path(scratch), python)) as wheel:
                wheel.extractall(unpacked)
            _move_into_place(unpacked, release)
    return release


def _download(version: str, folder: Path, python: str) -> Path:
    command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"verl=={version}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise ReleaseNotFetched(
            f"the wheel of verl {version}, which the tests need, was not found by pip: {process.stderr.strip()}\n"
            "Check pip's settings (pip config list), or put the wheel into a folder and name it in PIP_FIND_LINKS."
        )
    return wheels[0]


def _move_into_place(unpacked: Path, release: Path) -> None:
    """A rename, so that a release's folder is complete or not there, whoever else is fetching it."""
    try:
        unpacked.rename(release)
    except OSError:
        if not release.is_dir():
            raise
        shutil.rmtree(unpacked)


def main() -> int:
    for version in SUPPORTED_VERL:
        try:
            release_folder(version)
        except ReleaseNotFetched as error:
            print(f"setup: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
