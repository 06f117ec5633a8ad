"""Where the files of a model are that somebody named: a path, or the name of a model in the Hugging Face cache."""

from __future__ import annotations

import os
from pathlib import Path

from verl_fp16.preflight.refusals import (
    PICKLED,
    inaccessible,
    may_be_of_the_hub,
    no_permission,
    no_safetensors,
    no_weights_in,
    not_cached,
    pickled,
)


def located(named: Path) -> tuple[Path, bool]:
    """The folder or file of this name, and whether it is from the Hugging Face cache. The network is not asked.

    Raises:
        ModelError: there is none, or it is of a kind that holds no safetensors.
    """
    path = _at_home(named)
    try:
        path.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (snapshot := _cached(path)):
            return snapshot, True
        raise inaccessible(path, error) from None
    if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
        raise no_permission(path)
    if path.suffix == ".json" and path.is_file():
        raise no_weights_in(path)
    if path.suffix in PICKLED and path.is_file():
        raise pickled(path)
    return path, False


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # there is no user of this name
        return path


def _cached(name: Path) -> Path | None:
    """The snapshot of a model of the hub that the machine has, if any."""
    if name.is_symlink() or not may_be_of_the_hub(name):
        return None
    try:
        from huggingface_hub import snapshot_download

        snapshot = Path(snapshot_download(str(name), local_files_only=True))
    except (ImportError, OSError, ValueError):  # it is not there, or no such name is possible
        return None
    if not any(snapshot.glob("*.safetensors")):
        raise no_safetensors(snapshot) if any(snapshot.glob("*.bin")) else not_cached(name)
    return snapshot
