"""Where the files of a model are that somebody named."""

from __future__ import annotations

import os
from pathlib import Path

from verl_fp16.preflight.refusals import inaccessible, no_permission, no_weights_in, pickled


def located(named: Path) -> Path:
    """The folder or file that is there under this name.

    Raises:
        ModelError: there is none, or it holds no safetensors.
    """
    path = _at_home(named)
    try:
        path.stat()
    except OSError as error:
        raise inaccessible(path, error) from None
    if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
        raise no_permission(path)
    if path.suffix == ".json" and path.is_file():
        raise no_weights_in(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        raise pickled(path.parent, path.name)
    return path


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # there is no user of this name
        return path
