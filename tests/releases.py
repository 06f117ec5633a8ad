"""The supported releases of verl, unpacked, for tests that read their source or run against them.

Imports neither torch nor verl.
"""

from __future__ import annotations

import os

from verl_releases import release_folder  # scripts/: the same code as `make setup`

from verl_fp16.releases import SUPPORTED_VERL as RELEASES

__all__ = ["RELEASES", "release_environment", "release_folder"]


def release_environment(version: str) -> dict[str, str]:
    """Variables for a child process in which ``import verl`` and verl's distribution are those of ``version``.

    To be merged into the environment: ``{**os.environ, **release_environment(version)}``. Where verl does not load the
    entry points ``verl.plugins`` (below 0.9), the plugins are named in ``VERL_USE_EXTERNAL_MODULES``.
    """
    folder = release_folder(version)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    if '"verl.plugins"' in (folder / "verl" / "__init__.py").read_text():
        return {"PYTHONPATH": path}
    return {"PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "verl_fp16.plugin,verl_fp16.cpu.plugin"}
