#!/usr/bin/env python3
"""Pack a carry kit: all that a machine with torch and without a network needs to run this package with verl and vLLM.

::

    python scripts/gpu_kit.py pack --output DIR    # DIR/manifest.json, DIR/kit-000.bin ..., DIR/gpu_kit_there.pyz

Each piece is small enough for one transfer. What happens there is in gpu_kit_there.pyz, which travels along; see
docs/gpu-kit.md. Exit codes: 0 packed, 1 the machine failed, 2 a wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import gpu_kit_pins as pins
import gpu_kit_there
import gpu_kit_wheels
from gpu_kit_there.common import (
    FAILED,
    KitError,
    Progress,
    exit_code,
    megabytes,
    normalized,
    same_version,
    sha256_of,
    table,
    taking_its_place,
)
from gpu_kit_there.manifest import FORMAT, HEADER_BYTES, MAGIC, header, kit_name, manifest_digest
from gpu_kit_wheels import Built, Wanted

SCRIPT = "gpu_kit_there.pyz"
SMALLEST_PIECE = 2 * HEADER_BYTES


def pack(output: Path, folder: Path, wanted: Wanted, piece: int, *, offline: bool = False) -> dict:
    """Get the wheels, write the kit, tell what is in it; the manifest.

    Args:
        output: where the kit goes.
        folder: where the wheels are kept.
        piece: the most bytes of a piece.
        offline: pack what is in ``folder`` and fetch nothing.

    Raises:
        KitError: with what is wrong and the way out; a kit that was there before may be gone, no half one is left.
    """
    _refuse_other_torch(wanted)
    output.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    wheels, left, held = _from_folder(folder, wanted) if offline else _from_network(folder, wanted)
    if problems := gpu_kit_wheels.unmet(wheels, wanted, held):
        raise KitError("the kit would not work:\n  " + "\n  ".join(problems))
    manifest = write_kit(output, wheels, wanted, left, held, piece)
    print(told(manifest))
    return manifest


def _refuse_other_torch(wanted: Wanted) -> None:
    found = wanted.present.get("torch")
    if wanted.present and (found is None or not same_version(wanted.torch, found)):
        raise KitError(
            f"--present: the machine has {f'torch {found}' if found else 'no torch'}, and the kit would be for torch "
            f"{wanted.torch}: name the one that is there with --torch, and with --vllm one that goes with it"
        )


def _from_network(folder: Path, wanted: Wanted) -> tuple[list[Built], dict[str, str], frozenset[str]]:
    """The wheels to pack; what is left out because it is there; what comes with torch."""
    ours = gpu_kit_wheels.read_wheel(gpu_kit_wheels.own_wheel(folder))
    print("resolving (about a minute)", flush=True)
    held = gpu_kit_wheels.held_back(wanted)
    asked = [f"verl-fp16 @ {ours.file.resolve().as_uri()}", *gpu_kit_wheels.requirements(ours, wanted)]
    needed = gpu_kit_wheels.resolve(asked, wanted)
    left = {n: v for n, v in needed.items() if n not in held and gpu_kit_wheels.is_there(n, v, wanted)}
    packages = {n: v for n, v in needed.items() if n not in {*held, *left, *wanted.without, ours.name}}
    files = gpu_kit_wheels.fetch(packages, wanted, folder)
    return [ours, *map(gpu_kit_wheels.read_wheel, files)], left, held


def _from_folder(folder: Path, wanted: Wanted) -> tuple[list[Built], dict[str, str], frozenset[str]]:
    """The same from what is in the folder alone, where torch's own needs are known by their names."""
    wheels = [gpu_kit_wheels.read_wheel(file) for file in sorted(folder.glob("*.whl"))]
    if not wheels:
        raise KitError(f"--offline: there is no wheel in {folder}: name the folder with --wheels")
    names = [wheel.name for wheel in wheels]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise KitError(f"--offline: {folder} has several wheels of {', '.join(double)}: leave one of each")
    asked = {normalized(line.name) for wheel in wheels for line in wheel.requires}
    held = frozenset(
        n for n in asked if gpu_kit_wheels.comes_with_torch(n) and (n in pins.WITH_TORCH or n not in names)
    )
    left = {w.name: w.version for w in wheels if gpu_kit_wheels.is_there(w.name, w.version, wanted)}
    return [w for w in wheels if w.name not in {*held, "torch", *left, *wanted.without}], left, held | {"torch"}


def write_kit(
    output: Path, wheels: Sequence[Built], wanted: Wanted, left: dict[str, str], held: Iterable[str], piece: int
) -> dict:
    """Pieces, script and, last, the manifest: a kit without one is not taken for one.

    The same wheels and options give the same pieces, byte for byte.
    """
    if piece < SMALLEST_PIECE:
        raise KitError(f"--piece-mb: a piece needs {SMALLEST_PIECE} bytes at least")
    payload = piece - HEADER_BYTES
    ordered = sorted(wheels, key=lambda wheel: wheel.name)
    vllm = next((wheel.file for wheel in ordered if wheel.name == "vllm"), None)
    extensions, cuda = gpu_kit_wheels.extensions_of(vllm) if vllm else ((), None)
    named = {*pins.IMPORTS.values(), "transformers"}
    values = {
        "format": FORMAT,
        "torch": wanted.torch,
        "target": {"python": wanted.python, "machine": "x86_64", "glibc": wanted.glibc},
        "payload": payload,
        "pins": {wheel.name: wheel.version for wheel in ordered if wheel.name in named},
        "there": dict(sorted(left.items())),
        "without": sorted(wanted.without),
        "held": sorted(held),
        "imports": pins.IMPORTS,
        "cuda": cuda,
        "extensions": list(extensions),
        "pip": next(wheel.file.name for wheel in ordered if wheel.name == "pip"),
        "wheels": list(_laid_out(ordered, payload)),
    }
    values["kit"] = kit_name(values)
    size = sum(wheel["size"] for wheel in values["wheels"])
    if (free := shutil.disk_usage(output).free) < size:
        raise KitError(f"{output}: {megabytes(size)} are needed, and {megabytes(free)} are free", FAILED)
    (output / "manifest.json").unlink(missing_ok=True)
    _remove_pieces(output)
    blocks = _blocks([wheel.file for wheel in ordered], payload)
    progress = Progress("packing", size)
    values["pieces"] = [_write_piece(output, values["kit"], n, block, progress) for n, block in enumerate(blocks)]
    values["made"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    values["digest"] = manifest_digest(values)
    with taking_its_place(output / SCRIPT) as fresh:
        write_script(fresh)
    with taking_its_place(output / "manifest.json") as fresh:
        fresh.write_text(json.dumps(values, indent=1) + "\n")
    return values


def write_script(file: Path) -> None:
    """The package that joins and installs a kit, as the one file that Python runs; the same bytes each time."""
    package = Path(gpu_kit_there.__file__).parent
    run = f"from {package.name}.commands import main\nraise SystemExit(main())\n"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [
            ("__main__.py", run),
            *((f"{package.name}/{module.name}", module.read_text()) for module in sorted(package.glob("*.py"))),
        ]:
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)


def _remove_pieces(output: Path) -> None:
    for old in output.glob("kit-*.bin"):
        with old.open("rb") as stream:
            is_piece = stream.read(len(MAGIC)) == MAGIC
        if is_piece:
            old.unlink()


def _laid_out(wheels: Sequence[Built], payload: int) -> Iterator[dict]:
    """All wheels end to end, cut every ``payload`` bytes: small ones share a piece, large ones are cut."""
    start = 0
    progress = Progress("reading", sum(wheel.file.stat().st_size for wheel in wheels))
    for wheel in wheels:
        size = wheel.file.stat().st_size
        last = (start + size - 1) // payload
        yield {
            "name": wheel.file.name,
            "size": size,
            "sha256": sha256_of(wheel.file, progress),
            "start": start,
            "pieces": [piece_name(index) for index in range(start // payload, last + 1)],
        }
        start += size


def piece_name(index: int) -> str:
    return f"kit-{index:03d}.bin"


def _blocks(files: Sequence[Path], payload: int) -> Iterator[bytes]:
    """The bytes of all files end to end, ``payload`` at a time."""
    block = bytearray()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(payload - len(block)):
                block += part
                if len(block) == payload:
                    yield bytes(block)
                    block.clear()
    if block:
        yield bytes(block)


def _write_piece(output: Path, kit: str, index: int, block: bytes, progress: Progress) -> dict:
    content = header(kit, index) + block
    with taking_its_place(output / piece_name(index)) as fresh:
        fresh.write_bytes(content)
    progress.add(len(block))
    return {"name": piece_name(index), "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def told(manifest: dict) -> str:
    """What is in the kit, the largest first, and what is not."""
    wheels = sorted(manifest["wheels"], key=lambda wheel: (-wheel["size"], wheel["name"]))
    rows = [(wheel["name"], megabytes(wheel["size"])) for wheel in wheels]
    lines = [table(("wheel", "size"), rows), ""]
    if manifest["there"]:
        lines.append("there already: " + ", ".join(f"{name} {version}" for name, version in manifest["there"].items()))
    lines.append(
        f"vllm is built for CUDA {manifest['cuda']}, and so has to be the torch there"
        if manifest["cuda"]
        else "no wheel of vllm says what CUDA it is built for: whether the torch there is for it, nothing checks"
    )
    lines.append(f"left to torch {manifest['torch']}: {', '.join(manifest['held'])}")
    if manifest["without"]:
        lines.append(f"left out, as asked: {', '.join(manifest['without'])}")
    size = megabytes(sum(wheel["size"] for wheel in wheels))
    largest = megabytes(max(piece["size"] for piece in manifest["pieces"]))
    pieces = f"{len(manifest['pieces'])} pieces of {largest} at most"
    lines.append(f"kit {manifest['kit']}: {len(wheels)} wheels, {size}, {pieces}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command = top.add_subparsers(dest="command", required=True).add_parser("pack", help="make a kit")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the kit goes")
    command.add_argument("--python", default=pins.PYTHON, help="there [%(default)s]")
    command.add_argument("--torch", default=pins.TORCH, help="there; nothing else is taken to it [%(default)s]")
    command.add_argument("--vllm", default=pins.VLLM, help="the version to carry [%(default)s]")
    command.add_argument("--glibc", default=pins.GLIBC, help="the oldest one that has to do [%(default)s]")
    command.add_argument("--piece-mb", type=float, default=55, metavar="MB", help="the most of a piece [%(default)s]")
    text = "what `pip list --format=json` printed there: what satisfies is left out"
    command.add_argument("--present", type=Path, metavar="FILE", help=text)
    text = "leave a package out though something asks for it; may be repeated"
    command.add_argument("--without", action="append", default=[], metavar="NAME", help=text)
    command.add_argument("--wheels", type=Path, metavar="DIR", help="where wheels are kept [OUTPUT/wheels]")
    command.add_argument("--offline", action="store_true", help="fetch nothing: pack the wheels that are kept")
    return top


def _wanted(given: argparse.Namespace) -> Wanted:
    for option, value, form in (
        ("--python", given.python, r"3\.1[0-2]"),
        ("--glibc", given.glibc, r"2\.\d\d"),
        ("--torch", given.torch, r"\d+(\.\d+)+(\+\w+)?"),
        ("--vllm", given.vllm, r"\d+(\.\d+)+\w*"),
    ):
        if not re.fullmatch(form, value):
            raise KitError(f"{option} {value}: this is not such a version (they look like {form})")
    present = gpu_kit_wheels.read_present(given.present) if given.present else {}
    return Wanted(given.python, given.torch, given.vllm, given.glibc, present,
                  frozenset(map(normalized, given.without)))  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return exit_code(lambda: _pack(given), given.output, "fetched wheels are kept, and the same command goes on")


def _pack(given: argparse.Namespace) -> int:
    folder = given.wheels or given.output / "wheels"
    pack(given.output, folder, _wanted(given), int(given.piece_mb * 1e6), offline=given.offline)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
