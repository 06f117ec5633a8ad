"""What cannot be judged: one message for each case, which names the thing and says what to do. Imports no torch."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_LFS = b"version https://git-lfs"
_NAME_A_MODEL = "Name a Hugging Face model folder or a .safetensors file"


class ModelError(ValueError):
    """What was named cannot be judged: the message names the file, and what to do."""


def not_there(path: Path) -> ModelError:
    if path.is_symlink():
        return ModelError(
            f"{path}: it is a link to {os.readlink(path)}, which is not there. Mend the link, or download or save the "
            "model again"
        )
    message = f"{path}: there is no such file or folder. {_NAME_A_MODEL}"
    if not path.is_absolute() and len(path.parts) == 2:
        message += f"; a model of the hub has to be downloaded first: hf download {path} --local-dir {path.name}"
    return ModelError(message)


def inaccessible(path: Path, error: OSError) -> ModelError:
    """The system does not let ``path`` be read, with ``error``."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return not_there(path)
    if isinstance(error, PermissionError):
        return no_permission(path)
    way_out = "Move the folder elsewhere" if isinstance(error, IsADirectoryError) else _NAME_A_MODEL
    return ModelError(f"{path}: it cannot be read ({error.strerror}). {way_out}")


def no_permission(path: Path) -> ModelError:
    barred = next((folder for folder in reversed(path.absolute().parents) if not os.access(folder, os.X_OK)), path)
    command = f"chmod a+rX {shlex.quote(str(barred))}"
    return ModelError(f"{path}: there is no permission to read it. The owner can give it: {command}")


def unreadable(file: Path, error: Exception) -> ModelError:
    """safetensors cannot read ``file`` and gives ``error`` as the reason, unless the system has a plainer one."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(len(_LFS))
    except OSError as cause:
        return inaccessible(file, cause)
    if start == _LFS:
        return ModelError(f"{file}: this is a pointer of Git LFS and no model. Run: git lfs pull")
    reason = str(error).removeprefix("Error while deserializing header: ")
    return ModelError(
        f"{file}: safetensors cannot read it ({reason}): truncated, damaged, or of another format. "
        "Download or save it again"
    )


def no_weights_in(file: Path) -> ModelError:
    return ModelError(f"{file}: there are no weights in a {file.suffix} file. Name its folder: {file.parent}")


def pickled(folder: Path, name: str) -> ModelError:
    return ModelError(
        f'{folder}: its weights are {name} and no safetensors. Convert them: python -c "from transformers import '
        f"AutoModelForCausalLM as M; M.from_pretrained('{folder}', dtype='auto')"
        f".save_pretrained('{folder}-safetensors')\""
    )


def no_safetensors(folder: Path) -> ModelError:
    if any(folder.glob("pytorch_model*.bin*")):
        return pickled(folder, "pytorch_model.bin")
    there = f"has a {CONFIG} and no weights" if (folder / CONFIG).is_file() else f"has no {CONFIG} and no safetensors"
    return ModelError(f"{folder}: it is no model: it {there}. {_NAME_A_MODEL}")
