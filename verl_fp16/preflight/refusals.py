"""What cannot be judged: one message for each case, which names the thing and says what to do. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
PICKLED = (".bin", ".pt", ".pth")
_OF_FILES = (*PICKLED, ".safetensors", ".json", ".gguf")
_EXPORTED = "huggingface"  # the folder for it in a checkpoint of verl
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
    if may_be_of_the_hub(path) and len(path.parts) == 2 and not os.path.exists(path.parts[0]):
        message += f"; a model of the hub has to be downloaded first: hf download {path} --local-dir {path.name}"
    return ModelError(message)


def may_be_of_the_hub(path: Path) -> bool:
    """Whether a model of the Hugging Face hub could have this name."""
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", str(path), re.ASCII)) and path.suffix not in _OF_FILES


def not_cached(name: Path) -> ModelError:
    return ModelError(f"{name}: the Hugging Face cache has it without weights. Download them: hf download {name}")


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
    command = f"chmod a+rX {_quoted(barred)}"
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
    if file.suffix != ".safetensors":
        return ModelError(f"{file}: this is no model. {_NAME_A_MODEL}")
    reason = str(error).removeprefix("Error while deserializing header: ")
    return ModelError(
        f"{file}: safetensors cannot read it ({reason}): truncated, damaged, or of another format. "
        "Download or save it again"
    )


def no_weights_in(file: Path) -> ModelError:
    return ModelError(f"{file}: there are no weights in a {file.suffix} file. Name its folder: {file.parent}")


def pickled(file: Path) -> ModelError:
    checkpoint = _checkpoint_of(file)
    return _unmerged(file, checkpoint) if checkpoint else _to_convert(file.parent, file.name)


def no_safetensors(folder: Path) -> ModelError:
    if checkpoint := _checkpoint_of(folder):
        return _unmerged(folder, checkpoint)
    if any(folder.glob("pytorch_model*.bin*")):
        return _to_convert(folder, "pytorch_model.bin")
    there = f"has a {CONFIG} and no weights" if (folder / CONFIG).is_file() else f"has no {CONFIG} and no safetensors"
    return ModelError(f"{folder}: it is no model: it {there}. {_NAME_A_MODEL}")


def _to_convert(folder: Path, name: str) -> ModelError:
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M; "
        "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])"
    )
    folders = _quoted(folder, _beside(folder, "-safetensors"))
    return ModelError(
        f'{folder}: its weights are {name} and no safetensors. Convert them: python -c "{code}" {folders}'
    )


def _checkpoint_of(path: Path) -> Path | None:
    """The checkpoint of verl's FSDP engine that this is, or is in, or that is the actor's of this training step."""
    folder = path if path.is_dir() else path.parent
    places = [folder, folder / "actor"]
    if folder.absolute().name == _EXPORTED:
        places.append(folder.absolute().parent)
    shards = "model_world_size_*_rank_*.pt"
    return next((p for p in places if (p / "fsdp_config.json").is_file() or any(p.glob(shards))), None)


def _unmerged(path: Path, checkpoint: Path) -> ModelError:
    if any((checkpoint / _EXPORTED).glob("*.safetensors")):
        told = f"this is a verl checkpoint, and its weights are exported too. Name {checkpoint / _EXPORTED}"
        return ModelError(f"{path}: {told}")
    return ModelError(
        f"{path}: this is a verl checkpoint: merge it first: python -m verl.model_merger merge --backend fsdp "
        f"--local_dir {_quoted(checkpoint)} --target_dir {_quoted(_beside(checkpoint, '-merged'))}"
    )


def _beside(folder: Path, ending: str) -> Path:
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    return folder.with_name(folder.name + ending)


def _quoted(*paths: Path) -> str:
    return shlex.join(map(str, paths))
