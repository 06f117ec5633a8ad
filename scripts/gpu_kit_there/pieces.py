"""Pieces as they arrive, and the wheels that they are joined to."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_kit_there.common import BLOCK, FAILED, INCOMPLETE, KitError, Progress, megabytes, sha256_of, taking_its_place
from gpu_kit_there.manifest import HEADER_BYTES, MAGIC, Kit, Piece, Wheel, header, read_manifest


class NotTaken(Exception):
    """A file is not a piece that is wanted; the message says why."""


def collect(sources: Sequence[Path], folder: Path) -> int:
    """Copy what arrived into the kit's folder; 0 when every piece is there, else 3."""
    files = list(_files(sources))
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    kit = _manifest_for(folder, files)
    files = [file for file in files if file.name != "manifest.json"]
    progress = Progress("collecting", sum(file.stat().st_size for file in files))
    taken = known = 0
    for file in files:
        size = file.stat().st_size
        try:
            fresh = take(kit, folder, file)
            taken, known = taken + fresh, known + (not fresh)
        except NotTaken as reason:
            print(f"gpu-kit: not taken: {file}: {reason}", file=sys.stderr)
            _set_aside_in_place(kit, folder, file)
        progress.add(size)
    print(f"taken: {taken} pieces, already there: {known}")
    return _tell_pieces(kit, folder)


def _files(sources: Sequence[Path]) -> Iterator[Path]:
    for source in sources:
        if source.is_dir():
            yield from sorted(f for f in source.iterdir() if f.suffix == ".bin" or f.name == "manifest.json")
        elif source.exists():
            yield source
        else:
            raise KitError(f"{source} is not there: name the files or folders that arrived")


def _manifest_for(folder: Path, files: Sequence[Path]) -> Kit:
    """The kit's manifest; taken from what arrived if there is none yet."""
    own = folder / "manifest.json"
    arrived = [file for file in files if file.name == "manifest.json"]
    if not own.exists() and arrived:
        read_manifest(arrived[0])
        with taking_its_place(own) as fresh:
            shutil.copyfile(arrived[0], fresh)
    kit = read_manifest(own)
    for file in arrived:
        try:
            if (other := read_manifest(file).name) != kit.name:
                print(f"gpu-kit: not taken: {file}: of another kit, {other}; this is {kit.name}", file=sys.stderr)
        except KitError as error:
            print(f"gpu-kit: not taken: {error}", file=sys.stderr)
    return kit


def take(kit: Kit, folder: Path, file: Path) -> bool:
    """Copy one piece, whatever its file is called; whether it was not there yet.

    Raises:
        NotTaken: it is no piece of this kit, or broken.
    """
    piece = _piece_of(kit, file)
    place = folder / piece.name
    if place.exists() and place.stat().st_size == piece.size and sha256_of(place) == piece.sha256:
        return False
    if file.stat().st_size != piece.size:
        raise NotTaken(f"broken: {piece.name} has {piece.size:,} bytes, this has {file.stat().st_size:,}")
    with taking_its_place(place) as fresh:
        shutil.copyfile(file, fresh)
        if sha256_of(fresh) != piece.sha256:
            raise NotTaken(f"broken: the digest is not that of {piece.name}. Bring it again")
    return True


def _set_aside_in_place(kit: Kit, folder: Path, file: Path) -> None:
    """What was refused does not keep a piece's name, where it lies in the kit's folder itself."""
    for piece in kit.pieces:
        place = folder / piece.name
        if place.exists() and place.samefile(file):
            os.replace(place, folder / f"{piece.name}.broken")
            return


def _piece_of(kit: Kit, file: Path) -> Piece:
    with file.open("rb") as stream:
        match = re.fullmatch(MAGIC + rb"([0-9a-f]{16}) (\d{5})\n", stream.read(HEADER_BYTES))
    if not match:
        raise NotTaken("no piece of a kit, or broken in its first bytes")
    if (name := match[1].decode()) != kit.name:
        raise NotTaken(f"a piece of another kit, {name}; this is {kit.name}")
    if int(match[2]) >= len(kit.pieces):
        raise NotTaken(f"broken: it says it is piece {int(match[2])}, and this kit has {len(kit.pieces)}")
    return kit.pieces[int(match[2])]


def missing_pieces(kit: Kit, folder: Path) -> list[str]:
    """By size and head: no piece gets its name before its digest was right."""
    return [piece.name for index, piece in enumerate(kit.pieces) if not _looks_right(kit, index, folder / piece.name)]


def _looks_right(kit: Kit, index: int, file: Path) -> bool:
    if not file.is_file() or file.stat().st_size != kit.pieces[index].size:
        return False
    with file.open("rb") as stream:
        return stream.read(HEADER_BYTES) == header(kit.name, index)


def _tell_pieces(kit: Kit, folder: Path) -> int:
    missing = missing_pieces(kit, folder)
    print(f"kit {kit.name}: {len(kit.pieces) - len(missing)} of {len(kit.pieces)} pieces are there")
    if missing:
        print(f"missing: {' '.join(missing)}")
    return INCOMPLETE if missing else 0


def missing_wheels(kit: Kit, folder: Path) -> list[Wheel]:
    files = {wheel: folder / "wheels" / wheel.name for wheel in kit.wheels}
    return [wheel for wheel, file in files.items() if not file.is_file() or file.stat().st_size != wheel.size]


def status(folder: Path) -> int:
    """What is there; 0 when the kit is complete, as pieces or joined, else 3."""
    kit = read_manifest(folder / "manifest.json")
    code = _tell_pieces(kit, folder)
    missing = missing_wheels(kit, folder)
    print(f"{len(kit.wheels) - len(missing)} of {len(kit.wheels)} wheels are joined")
    print(f"for Python {kit.target['python']}, {kit.target['machine']}, torch {kit.torch}")
    return code if missing else 0


def join(folder: Path) -> int:
    """Write the wheels, each under its name only when its digest is right; those that are there are kept."""
    kit = read_manifest(folder / "manifest.json")
    wheels = folder / "wheels"
    wanted = [wheel for wheel in kit.wheels if not _is_whole(wheels / wheel.name, wheel)]
    if wanted:
        if missing := missing_pieces(kit, folder):
            raise KitError(f"pieces are missing: {' '.join(missing)}. Collect them first", INCOMPLETE)
        _set_broken_pieces_aside(kit, folder)
        size = sum(wheel.size for wheel in wanted)
        wheels.mkdir(exist_ok=True)
        if (free := shutil.disk_usage(wheels).free) < size:
            raise KitError(f"{wheels}: {megabytes(size)} are needed, and {megabytes(free)} are free", FAILED)
        progress = Progress("joining", size)
        for wheel in wanted:
            _join_one(kit, folder, wheel, progress)
    print(f"{len(kit.wheels)} wheels in {wheels}, every digest is right")
    return 0


def _is_whole(file: Path, wheel: Wheel) -> bool:
    return file.is_file() and file.stat().st_size == wheel.size and sha256_of(file) == wheel.sha256


def _set_broken_pieces_aside(kit: Kit, folder: Path) -> None:
    progress = Progress("checking the pieces", sum(piece.size for piece in kit.pieces))
    broken = [piece.name for piece in kit.pieces if sha256_of(folder / piece.name, progress) != piece.sha256]
    for name in broken:
        os.replace(folder / name, folder / f"{name}.broken")
    if broken:
        raise KitError(f"broken since they were collected: {' '.join(broken)}. Bring them again", INCOMPLETE)


def _join_one(kit: Kit, folder: Path, wheel: Wheel, progress: Progress) -> None:
    digest = hashlib.sha256()
    with taking_its_place(folder / "wheels" / wheel.name) as fresh:
        with fresh.open("wb") as stream:
            for block in wheel_bytes(kit, folder, wheel):
                digest.update(block)
                stream.write(block)
                progress.add(len(block))
        if digest.hexdigest() != wheel.sha256:
            raise KitError(f"{wheel.name}: the digest differs, though every piece is right: the kit was packed wrongly")


def wheel_bytes(kit: Kit, folder: Path, wheel: Wheel) -> Iterator[bytes]:
    place, end = wheel.start, wheel.start + wheel.size
    while place < end:
        index, within = divmod(place, kit.payload)
        with (folder / kit.pieces[index].name).open("rb") as stream:
            stream.seek(HEADER_BYTES + within)
            left = min(end - place, kit.payload - within)
            while left:
                block = stream.read(min(BLOCK, left))
                if not block:
                    raise KitError(f"{kit.pieces[index].name} ended early: collect it again", INCOMPLETE)
                yield block
                left -= len(block)
                place += len(block)
