"""Which verl is installed, found without importing it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from packaging.version import InvalidVersion, Version

from verl_fp16.releases import SUPPORTED_VERL

EXTERNAL_MODULES = ("verl_fp16.plugin", "verl_fp16.cpu.plugin")
"""What ``VERL_USE_EXTERNAL_MODULES`` has to name where verl does not read the entry points ``verl.plugins``."""


class VerlNotFound(RuntimeError):
    """verl is not installed in this environment, or what carries its name is not verl."""


@dataclass(frozen=True)
class InstalledVerl:
    """A verl as ``python -m verl...`` would import it from the current folder.

    Args:
        version: as its file ``version/version`` says.
        folder: the package's folder.
    """

    version: str
    folder: Path

    @property
    def config_dir(self) -> Path:
        """The folder of ``ppo_trainer.yaml``."""
        return self.folder / "trainer" / "config"

    @property
    def has_platforms(self) -> bool:
        """Whether it knows platforms, without which it cannot be told to run on a CPU (verl 0.9 and later)."""
        return (self.folder / "plugin" / "platform").is_dir()

    @property
    def supported(self) -> bool:
        """Whether this release is one of :data:`SUPPORTED_VERL`; a source tree's suffix (``.dev``) does not count."""
        try:
            return Version(self.version).base_version in SUPPORTED_VERL
        except InvalidVersion:
            return False

    @property
    def reads_entry_points(self) -> bool:
        """Whether ``import verl`` loads the entry points ``verl.plugins`` (verl 0.9 and later)."""
        try:
            return Version(Version(self.version).base_version) >= Version("0.9")
        except InvalidVersion:
            return True


def find_verl() -> InstalledVerl:
    """Find the verl that a child ``python -m verl...`` of this process imports.

    Raises:
        VerlNotFound: with what was found instead and what to do.
    """
    spec = _find_spec()
    if spec is None or spec.origin is None:
        raise VerlNotFound(f"verl is not installed in this environment: install verl {SUPPORTED_VERL[-1]}")
    folder = Path(spec.origin).parent
    try:
        version = (folder / "version" / "version").read_text().strip()
    except OSError as error:
        raise VerlNotFound(f"{folder} is not a verl that is known here: {error}") from None
    return InstalledVerl(version, folder)


def _find_spec() -> ModuleSpec | None:
    # `python -m` puts the current folder first, a console script does not: in a verl checkout the two would differ.
    here = PathFinder.find_spec("verl", [os.getcwd()])
    return here if here is not None and here.origin is not None else importlib.util.find_spec("verl")
