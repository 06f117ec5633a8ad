"""What an interrupted command's results were made of, so that it goes on with the same, or refuses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PIECE = 2**20
_DIGESTED = {
    "model": "the model is another, or its files were written anew",
    "data": "the data is another, or was changed",
    "prompts": "the prompts are others, or were changed",
    "reward": "the reward function is another, or its file was changed",
}


def digest(file: Path) -> str:
    """Of a file's bytes."""
    found = hashlib.blake2b(digest_size=8)
    with open(file, "rb") as opened:
        while piece := opened.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def digest_of_model(folder: Path) -> str:
    """Of a model's configuration, and the names, sizes and times of its weights, which would take long to read."""
    found = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.iterdir()):
        status = os.stat(file)
        if file.suffix == ".json":
            found.update(file.read_bytes())
        elif file.is_file():
            found.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, in the order of the names; "" where there are none."""
    other = [name for name in sorted({**was, **now}) if was.get(name) != now.get(name)]
    return ", ".join(_DIGESTED.get(name) or f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in other)
