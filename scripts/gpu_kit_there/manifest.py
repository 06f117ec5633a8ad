"""The manifest of a kit: what its pieces hold, and the machine that it is for."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from gpu_kit_there.common import KitError, normalized

FORMAT = 1
MAGIC = b"gpu-kit-1 "
HEADER_BYTES = len(MAGIC) + 16 + 1 + 5 + 1


@dataclass(frozen=True)
class Piece:
    """A file of the kit: a header of :data:`HEADER_BYTES`, then its part of all wheels laid end to end."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Wheel:
    """A wheel: bytes ``start`` to ``start + size`` of all wheels laid end to end."""

    name: str
    size: int
    sha256: str
    start: int

    @property
    def distribution(self) -> str:
        return normalized(self.name.split("-")[0])

    @property
    def version(self) -> str:
        return self.name.split("-")[1]


@dataclass(frozen=True)
class Kit:
    """A manifest that was read and found whole.

    Args:
        name: 16 hexadecimal digits, by which its pieces are known.
        torch: the version that has to be there.
        target: ``python``, ``machine`` and ``glibc``.
        payload: bytes of the wheels in each piece but the last.
        there: packages that were left out because they are there: name -> version.
        held: packages that come with torch and are never installed.
        imports: module -> the distribution it belongs to; what has to work after an installation.
        pip: the wheel of pip that installs the others.
        cuda: major version of the CUDA that vLLM is built for; None where no wheel says.
        extensions: modules of vLLM that are compiled for it, which ``import vllm`` does not load.
    """

    name: str
    torch: str
    target: dict[str, str]
    payload: int
    there: dict[str, str]
    held: tuple[str, ...]
    imports: dict[str, str]
    pip: str
    wheels: tuple[Wheel, ...]
    pieces: tuple[Piece, ...]
    cuda: str | None
    extensions: tuple[str, ...]


def header(kit: str, index: int) -> bytes:
    return MAGIC + f"{kit} {index:05d}\n".encode()


def canonical(values: object) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def kit_name(values: dict) -> str:
    """From what the kit holds and is for: neither from its pieces, which carry it, nor from the date."""
    named = {key: value for key, value in values.items() if key not in ("kit", "made", "digest", "pieces")}
    return hashlib.sha256(canonical(named)).hexdigest()[:16]


def manifest_digest(values: dict) -> str:
    return hashlib.sha256(canonical({key: value for key, value in values.items() if key != "digest"})).hexdigest()


def read_manifest(file: Path) -> Kit:
    """
    Raises:
        KitError: it is not there, damaged, or of a format that is not known here.
    """
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise KitError(f"{file} is not there: copy manifest.json along with the pieces and collect it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise KitError(f"{file} is damaged ({error}): copy it again") from None
    if not isinstance(values, dict) or "kit" not in values:
        raise KitError(f"{file} is not the manifest of a kit")
    if values.get("format") != FORMAT:
        raise KitError(f"{file} has format {values.get('format')}; this script knows {FORMAT}: take the kit's own one")
    if values.get("digest") != manifest_digest(values) or values["kit"] != kit_name(values):
        raise KitError(f"{file} is damaged, or was changed after it was made: its digest differs. Copy it again")
    try:
        kit = _kit(values)
    except (KeyError, TypeError, ValueError) as error:
        raise KitError(f"{file} is not a manifest that was made by gpu_kit.py pack: {error!r}") from None
    _refuse_contradictions(file, kit)
    return kit


def _kit(values: dict) -> Kit:
    return Kit(
        name=values["kit"],
        torch=values["torch"],
        target=dict(values["target"]),
        payload=int(values["payload"]),
        there=dict(values["there"]),
        held=tuple(values["held"]),
        imports=dict(values["imports"]),
        pip=values["pip"],
        wheels=tuple(Wheel(**{key: wheel[key] for key in Wheel.__dataclass_fields__}) for wheel in values["wheels"]),
        pieces=tuple(Piece(**piece) for piece in values["pieces"]),
        cuda=values.get("cuda"),
        extensions=tuple(values.get("extensions", ())),
    )


def _refuse_contradictions(file: Path, kit: Kit) -> None:
    for name in [*(wheel.name for wheel in kit.wheels), *(piece.name for piece in kit.pieces)]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.!+-]*\.(whl|bin)", name):
            raise KitError(f"{file} names a file that cannot be one of a kit: {name!r}")
    for wheel in kit.wheels:
        if wheel.distribution in {"torch", *kit.held}:
            raise KitError(f"{file} holds {wheel.name}, which must come with the torch that is there: pack it again")
    if kit.pip not in {wheel.name for wheel in kit.wheels}:
        raise KitError(f"{file} names no wheel of pip: pack it again")
