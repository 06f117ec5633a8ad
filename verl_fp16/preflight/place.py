"""Where the files of a model are that somebody named."""

from __future__ import annotations

from pathlib import Path

from verl_fp16.preflight.refusals import ModelError, not_there, pickled


def located(named: Path) -> Path:
    """The folder or file that is there under this name.

    Raises:
        ModelError: there is none, or it holds no safetensors.
    """
    path = _at_home(named)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise not_there(path) from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}. Name a Hugging Face model folder or a .safetensors file") from None
    if path.suffix in (".bin", ".pt", ".pth"):
        raise pickled(path.parent, path.name)
    return path


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # there is no user of this name
        return path
