#!/usr/bin/env python3
"""Take in, join and install a carry kit on a machine without a network.

The kit is what ``gpu_kit.py pack`` made elsewhere: ``manifest.json`` and pieces ``kit-000.bin`` and so on. This file
travels with them and needs Python 3.10 and its standard library alone::

    python gpu_kit_there.py collect ARRIVED... --kit KIT    # as often as something arrives, in any order
    python gpu_kit_there.py status --kit KIT
    python gpu_kit_there.py join --kit KIT
    python gpu_kit_there.py install --kit KIT               # a venv KIT/venv over the torch that is there

Exit codes: 0 done (collect: complete), 1 the machine failed (a full disk, an import), 2 a wrong input, 3 pieces are
missing, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1
MAGIC = b"gpu-kit-1 "
HEADER_BYTES = len(MAGIC) + 16 + 1 + 5 + 1
BLOCK = 1 << 20
TELL_EVERY = 10.0  # seconds
CHECK_LIMIT = 900.0  # seconds that the imports may take; a cold disk makes them slow
UNFINISHED = ".gpu-kit-unfinished"
FINISHED = "gpu-kit.json"

FAILED, WRONG_INPUT, INCOMPLETE, INTERRUPTED = 1, 2, 3, 130


class KitError(Exception):
    """Ends the command with one message.

    Args:
        message: what is wrong, of which file or package, and the way out.
        code: the exit code.
    """

    def __init__(self, message: str, code: int = WRONG_INPUT) -> None:
        super().__init__(message)
        self.code = code


class NotTaken(Exception):
    """A file is not a piece that is wanted; the message says why."""


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


@dataclass(frozen=True)
class Torch:
    """What a torch says of itself.

    Args:
        version: as in 2.11.0+cu130.
        cuda: what it was built for, as in 13.0; None without.
        gpu: whether it sees a GPU.
    """

    version: str
    cuda: str | None
    gpu: bool


def normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def same_version(wanted: str, found: str) -> bool:
    """Whether ``found`` meets ``==wanted``: a local label (+cu130) counts only where one is wanted."""
    return found == wanted or ("+" not in wanted and found.split("+")[0] == wanted)


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def header(kit: str, index: int) -> bytes:
    return MAGIC + f"{kit} {index:05d}\n".encode()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class Progress:
    """A line each ten seconds, with what is done and the time left, for what takes longer than that.

    Args:
        doing: what is done, as in "joining".
        total: bytes; 0 where nothing can be counted.
        amount: how a number of them is told.
    """

    def __init__(self, doing: str, total: int, amount: Callable[[float], str] = megabytes) -> None:
        self.doing, self.total, self.done, self.amount = doing, total, 0, amount
        self.begun = self.told = time.monotonic()

    def add(self, size: int) -> None:
        self.done += size
        self.tell()

    def tell(self) -> None:
        now = time.monotonic()
        if now - self.told < TELL_EVERY:
            return
        self.told = now
        if not self.total:
            print(f"{self.doing}: {now - self.begun:.0f} s so far, time left not known", flush=True)
            return
        left = (now - self.begun) * (self.total - self.done) / self.done if self.done else None
        rest = "time left not known yet" if left is None else f"about {left:.0f} s left"
        print(f"{self.doing}: {self.amount(self.done)} of {self.amount(self.total)}, {rest}", flush=True)


def sha256_of(file: Path, progress: Progress | None = None) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            if progress:
                progress.add(len(block))
    return digest.hexdigest()


@contextlib.contextmanager
def taking_its_place(file: Path) -> Iterator[Path]:
    """Yields where to write; ``file`` is replaced by it as a whole, or, on any failure, stays as it was."""
    fresh = file.with_name(f".{file.name}.tmp")
    try:
        yield fresh
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)


# The manifest


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


# Pieces


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


# Installing


def install(folder: Path, target: str, place: Path | None) -> int:
    """Install the joined wheels; torch stays what it is.

    Args:
        target: ``venv``, or ``running`` for the environment of the Python that runs this.
        place: where the venv goes; KIT/venv by default.

    Raises:
        KitError: before anything is changed, where this machine is not what the kit was packed for.
    """
    folder = folder.resolve()
    kit = read_manifest(folder / "manifest.json")
    refuse_another_machine(kit)
    before = torch_facts(sys.executable, folder, kit.torch)
    refuse_another_torch(kit, before)
    refuse_other_packages(kit)
    _require_wheels(kit, folder)
    needed = _unpacked_size(kit, folder)
    if target == "running":
        _require_room(Path(sysconfig.get_path("purelib")), needed)
        _install_wheels(kit, folder, sys.executable)
        return _check(kit, folder, sys.executable, before)
    place = (place or folder / "venv").absolute()
    with _making_venv(place, kit, needed) as python:
        if python:
            _install_wheels(kit, folder, python)
    return _finish_venv(kit, folder, place, before)


def refuse_another_machine(kit: Kit) -> None:
    found = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "machine": platform.machine()}
    for key, version in found.items():
        if version != kit.target[key]:
            raise KitError(f"this is {key} {version}, and the kit is for {kit.target[key]}: nothing was changed")
    library, version = platform.libc_ver()
    if library == "glibc" and _numbers(version) < _numbers(kit.target["glibc"]):
        raise KitError(f"this is glibc {version}, and the kit needs {kit.target['glibc']}: nothing was changed")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def refuse_another_torch(kit: Kit, found: Torch) -> None:
    if not same_version(kit.torch, found.version):
        raise KitError(
            f"torch {found.version} is here, and the kit was packed for torch {kit.torch}: nothing was changed. Pack "
            f"one with --torch {found.version.split('+')[0]} and a vLLM that goes with it"
        )
    if kit.cuda and (found.cuda or "").split(".")[0] != kit.cuda:
        raise KitError(
            f"torch {found.version} here is built {f'for CUDA {found.cuda}' if found.cuda else 'without CUDA'}, and "
            f"the kit's vllm for CUDA {kit.cuda}: nothing was changed. vLLM needs a torch for the same CUDA: run this "
            "with a Python that has one, or pack a kit of a vLLM that goes with this one"
        )


def refuse_other_packages(kit: Kit) -> None:
    """What the kit leaves out has to be here in the version it was left out for."""
    told = []
    for name, wanted in sorted(kit.there.items()):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            told.append(f"{name} {wanted} (not here)")
            continue
        if not same_version(wanted.split("+")[0], found):
            told.append(f"{name} {wanted} (here: {found})")
    if told:
        raise KitError(
            f"the kit leaves out what another machine had: {', '.join(told)}. Nothing was changed. Pack it again with "
            "this machine's list (pip list --format=json) as --present"
        )


def _require_wheels(kit: Kit, folder: Path) -> None:
    progress = Progress("checking the wheels", sum(wheel.size for wheel in kit.wheels))
    for wheel in kit.wheels:
        file = folder / "wheels" / wheel.name
        if not file.is_file() or sha256_of(file, progress) != wheel.sha256:
            raise KitError(f"{wheel.name} is not there as it was packed: run join first", INCOMPLETE)


def _unpacked_size(kit: Kit, folder: Path) -> int:
    size = 0
    for wheel in kit.wheels:
        with zipfile.ZipFile(folder / "wheels" / wheel.name) as archive:
            size += sum(file.file_size for file in archive.infolist())
    return size


def _require_room(place: Path, needed: int) -> None:
    """
    Raises:
        KitError: the disk that ``place`` is on, or will be, has fewer bytes left.
    """
    there_already = next(folder for folder in (place, *place.parents) if folder.is_dir())
    if (free := shutil.disk_usage(there_already).free) < needed:
        raise KitError(
            f"{place}: {megabytes(needed)} are needed, and {megabytes(free)} are free: nothing was installed", FAILED
        )


def torch_facts(python: str, folder: Path, wanted: str) -> Torch:
    """What the torch says of itself that this Python has."""
    log = folder / "torch.log"
    code = "import torch; print('gpu-kit', torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    failed = _run_telling([python, "-c", code], folder, log, Progress("importing torch", 0))
    output = log.read_text(errors="replace")
    log.unlink()
    match = re.search(r"^gpu-kit (\S+) (\S+) (True|False)$", output, re.M)
    if failed or not match:
        reason = _last_line(output)
        raise KitError(f"{python} cannot import torch, and the kit needs torch {wanted} there: {reason}")
    return Torch(match[1], None if match[2] == "None" else match[2], match[3] == "True")


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no word why"])[-1]


@contextlib.contextmanager
def _making_venv(place: Path, kit: Kit, needed: int) -> Iterator[str | None]:
    """Yields the Python of a new venv, None where it is there already; on a failure it is gone again.

    Args:
        needed: bytes that go into it.
    """
    if (place / FINISHED).is_file():
        if json.loads((place / FINISHED).read_text()).get("kit") == kit.name:
            print(f"{place} holds this kit already")
            yield None
            return
        raise KitError(f"{place} holds another kit: remove it, or name another folder with --venv")
    if place.exists() and not (place / UNFINISHED).exists() and (not place.is_dir() or any(place.iterdir())):
        raise KitError(f"{place} is there and no venv of a kit: remove it, or name another folder with --venv")
    shutil.rmtree(place, ignore_errors=True)
    _require_room(place, needed)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(shutil.rmtree, place, ignore_errors=True)
        place.mkdir(parents=True)
        (place / UNFINISHED).touch()
        venv.EnvBuilder(system_site_packages=True, with_pip=False, symlinks=True).create(place)
        python = str(place / "bin" / "python")
        _show_what_is_here(python, place)
        yield python
        on_failure.pop_all()


def _show_what_is_here(python: str, place: Path) -> None:
    """Where the Python that runs this is one of a venv, a venv made from it does not see its packages: only those of
    the Python below both. A .pth puts them behind the new venv's own."""
    code = "import json, sys; print(json.dumps(sys.path))"
    seen = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    paths = dict.fromkeys([*site.getsitepackages(), *sys.path])
    mine = [path for path in paths if Path(path).name in ("site-packages", "dist-packages")]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in mine if path not in seen]
    own = next(Path(path) for path in seen if Path(path).is_relative_to(place) and Path(path).name == "site-packages")
    (own / "_gpu_kit_base.pth").write_text("".join(lines))


def _install_wheels(kit: Kit, folder: Path, python: str) -> None:
    """In batches, with the kit's own pip, without its settings and without looking for dependencies."""
    wheels = [wheel for wheel in kit.wheels if wheel.name != kit.pip]
    options = ["--isolated", "--disable-pip-version-check", "install", "--no-index", "--no-deps", "--no-cache-dir"]
    options += ["--no-compile", "--no-warn-script-location", "--quiet"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    progress = Progress("installing", sum(wheel.size for wheel in wheels))
    log = folder / "install.log"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as unpacked:
        with zipfile.ZipFile(folder / "wheels" / kit.pip) as archive:
            archive.extractall(unpacked)
        for batch in _batches(wheels):
            files = [str(folder / "wheels" / wheel.name) for wheel in batch]
            if _run_telling([python, f"{unpacked}/pip", *options, *files], folder, log, progress, environment):
                names = ", ".join(wheel.name for wheel in batch)
                raise KitError(f"pip could not install {names}:\n{log.read_text(errors='replace').rstrip()}", FAILED)
            log.unlink()
            progress.add(sum(wheel.size for wheel in batch))


def _batches(wheels: Sequence[Wheel], most: int = 16, size: int = 100_000_000) -> Iterator[list[Wheel]]:
    batch: list[Wheel] = []
    for wheel in wheels:
        if batch and (len(batch) == most or sum(w.size for w in batch) + wheel.size > size):
            yield batch
            batch = []
        batch.append(wheel)
    if batch:
        yield batch


def _run_telling(
    command: list[str], folder: Path, log: Path, progress: Progress, environment: dict[str, str] | None = None
) -> int:
    """Run with the output in ``log``; the exit code. Neither an interrupt nor the time limit leaves it running."""
    end = time.monotonic() + CHECK_LIMIT
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    raise KitError(f"this took longer than {CHECK_LIMIT:.0f} s: {' '.join(command[:3])}", FAILED)
                time.sleep(0.05)
                progress.tell()
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    return process.returncode


def _finish_venv(kit: Kit, folder: Path, place: Path, before: Torch) -> int:
    code = _check(kit, folder, str(place / "bin" / "python"), before)
    if code == 0:
        with taking_its_place(place / FINISHED) as fresh:
            fresh.write_text(json.dumps({"kit": kit.name, "torch": before.version}))
        (place / UNFINISHED).unlink(missing_ok=True)
        print(f"use it with: {place}/bin/python")
    return code


def _check(kit: Kit, folder: Path, python: str, before: Torch) -> int:
    """torch as it was, every module imports in the kit's version, and vLLM's extensions load."""
    after = torch_facts(python, folder, kit.torch)
    if after.version != before.version:
        raise KitError(
            f"torch was {before.version} and is {after.version} for {python}: remove that environment", FAILED
        )
    code = (
        "import importlib, importlib.metadata as m\n"
        f"for module, name in {sorted(kit.imports.items())!r}:\n"
        "    importlib.import_module(module)\n"
        "    print('gpu-kit', module, m.version(name), flush=True)\n"
        "import torch\n"
        f"for module in {list(kit.extensions)!r}:\n"
        "    try:\n"
        "        importlib.import_module(module)\n"
        "    except ImportError as error:\n"
        "        print(f'gpu-kit-unloaded {module} does not load: ImportError: {error}', flush=True)\n"
    )
    log = folder / "check.log"
    failed = _run_telling([python, "-c", code], folder, log, Progress("importing", 0))
    output = log.read_text(errors="replace")
    found = dict(re.findall(r"^gpu-kit (\S+) (\S+)$", output, re.M))
    carried = {wheel.distribution: wheel.version for wheel in kit.wheels} | kit.there
    rows = [
        (module, carried.get(normalized(name), "?"), found.get(module, "does not import"))
        for module, name in sorted(kit.imports.items())
    ]
    print(table(("module", "in the kit", "imported"), [*rows, ("torch", kit.torch, after.version)]))
    if failed:
        raise KitError(f"an import failed: {_last_line(output)}\nall of it: {log}", FAILED)
    if others := [module for module, wanted, seen in rows if not same_version(wanted, seen)]:
        raise KitError(f"another version comes first on the path (PYTHONPATH?): {', '.join(others)}", FAILED)
    _judge_extensions(re.findall(r"^gpu-kit-unloaded (.*)$", output, re.M), after, log)
    log.unlink()
    return 0


def _judge_extensions(unloaded: Sequence[str], torch: Torch, log: Path) -> None:
    """Without a GPU that is seen, the driver's library may be missing, which an extension asks for."""
    if unloaded and torch.gpu:
        raise KitError(f"{'; '.join(unloaded)}\nall of it: {log}", FAILED)
    if not torch.gpu:
        told = "; ".join(["torch sees no GPU here, so that nothing was tried that needs one", *unloaded])
        print(f"gpu-kit: warning: {told}", file=sys.stderr)


# The command line


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    texts = {
        "collect": "copy the pieces that arrived into the kit's folder",
        "status": "what is there and what is missing",
        "join": "write the wheels and check each",
        "install": "install the wheels beside the torch that is here",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "collect":
            command.add_argument("sources", nargs="+", type=Path, metavar="FROM", help="files or folders that arrived")
        command.add_argument("--kit", type=Path, required=True, metavar="DIR", help="the kit's folder on this machine")
        if name == "install":
            text = "a venv that sees the packages of this Python, or this Python itself"
            command.add_argument("--target", choices=("venv", "running"), default="venv", help=text)
            command.add_argument("--venv", type=Path, metavar="DIR", help="where the venv goes [KIT/venv]")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        if given.command == "collect":
            return collect(given.sources, given.kit)
        if given.command == "install":
            if given.venv and given.target == "running":
                raise KitError("--venv has no effect with --target running: leave one of them out")
            return install(given.kit, given.target, given.venv)
        return {"status": status, "join": join}[given.command](given.kit)
    except KitError as error:
        print(f"gpu-kit: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"gpu-kit: {error.filename or given.kit}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("gpu-kit: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
