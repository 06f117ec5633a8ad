"""The supported releases of verl, unpacked, for tests that read their source or run against them.

Imports neither torch nor verl.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from verl_releases import release_folder  # scripts/: the same code as `make setup`

from verl_fp16 import source_patch
from verl_fp16.releases import SUPPORTED_VERL as RELEASES

# The newest release with its source patch applied.
PATCHED = f"{RELEASES[-1]} patched"

__all__ = ["PATCHED", "RELEASES", "release_environment", "release_folder", "version_of"]


def version_of(release: str) -> str:
    """The version that verl has in ``release``: one of :data:`RELEASES`, or :data:`PATCHED`."""
    return release.removesuffix(" patched")


def release_environment(release: str) -> dict[str, str]:
    """Variables for a child process in which ``import verl`` and verl's distribution are those of ``release``.

    To be merged into the environment: ``{**os.environ, **release_environment(release)}``. Where verl does not load the
    entry points ``verl.plugins`` (below 0.9), the plugins are named in ``VERL_USE_EXTERNAL_MODULES``.
    """
    version = version_of(release)
    folder = release_folder(version) if release == version else patched_folder(version)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    if '"verl.plugins"' in (folder / "verl" / "__init__.py").read_text():
        return {"PYTHONPATH": path}
    return {"PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "verl_fp16.plugin,verl_fp16.cpu.plugin"}


def patched_folder(version: str) -> Path:
    """The unpacked wheel of ``version`` with today's source patch applied; made when the patch has changed."""
    released = release_folder(version)
    patch = hashlib.sha256((source_patch.PATCHES / f"verl-{version}.diff").read_bytes()).hexdigest()[:12]
    folder = released.with_name(f"{version}-patched-{patch}")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=released.parent) as scratch:
            copy = Path(scratch) / "verl"
            shutil.copytree(released, copy)
            source_patch.apply(copy)
            if not folder.is_dir():
                copy.rename(folder)
    return folder
