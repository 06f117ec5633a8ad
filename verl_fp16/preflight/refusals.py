"""What cannot be judged: one message for each case, which names the thing and says what to do. Imports no torch."""

from __future__ import annotations

from pathlib import Path

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"


class ModelError(ValueError):
    """What was named cannot be judged: the message names the file, and what to do."""


def not_there(path: Path) -> ModelError:
    message = f"{path}: there is no such file or folder. Name a Hugging Face model folder or a .safetensors file"
    if not path.is_absolute() and len(path.parts) == 2:
        message += f"; a model of the hub has to be downloaded first: hf download {path} --local-dir {path.name}"
    return ModelError(message)


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
    return ModelError(f"{folder}: it is no model: it {there}. Name a Hugging Face model folder or a .safetensors file")
