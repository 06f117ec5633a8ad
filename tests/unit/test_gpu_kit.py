"""Pieces of a carry kit: cut, carried in any order, some twice or broken, and joined to the same wheels."""

from __future__ import annotations

import ast
import errno
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_kit_there
import pytest
from gpu_kit_fakes import make_house, make_wheel, pack
from gpu_kit_there import commands, common
from gpu_kit_there import manifest as manifests
from gpu_kit_there import pieces as joining

pytestmark = pytest.mark.unit


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Wheels of which one is larger than a piece, and several fit into one."""
    make_house(tmp_path / "house")
    noise = random.Random(0).randbytes(4000).hex()
    make_wheel(tmp_path / "house", "vllm", files={"vllm/__init__.py": f"noise = {noise!r}\n"})
    return tmp_path / "house"


@pytest.fixture
def packed(house: Path, tmp_path: Path) -> Path:
    return pack(house, tmp_path / "packed")


def run(*arguments: object) -> int:
    return commands.main([str(argument) for argument in arguments])


def pieces(packed: Path) -> list[Path]:
    return sorted(packed.glob("kit-*.bin"))


def remade(packed: Path, change: Callable[[dict], None], *, name: bool = True) -> None:
    """Change the manifest and make its digests fit."""
    file = packed / "manifest.json"
    values = json.loads(file.read_text())
    change(values)
    if name:
        values["kit"] = manifests.kit_name(values)
    values["digest"] = manifests.manifest_digest(values)
    file.write_text(json.dumps(values))


def test_the_script_that_travels_needs_the_standard_library_alone():
    names: set[str] = set()
    for module in Path(gpu_kit_there.__file__).parent.glob("*.py"):
        tree = ast.parse(module.read_text())
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"gpu_kit_there", *sys.stdlib_module_names}
    assert "gpu_kit_there.common" in names and "zipfile" in names


def test_carried_one_by_one_in_any_order_the_wheels_are_the_same(house, packed, tmp_path, capsys):
    kit, order = tmp_path / "kit", pieces(packed)
    random.Random(1).shuffle(order)
    assert len(order) > 5
    assert all(piece.stat().st_size <= 1500 for piece in order)
    manifest = json.loads((packed / "manifest.json").read_text())
    cut = {wheel["name"]: len(wheel["pieces"]) for wheel in manifest["wheels"]}
    assert cut["vllm-1.0-py3-none-any.whl"] > 2
    shared = [piece for wheel in manifest["wheels"] for piece in wheel["pieces"]]
    assert max(map(shared.count, shared)) > 1

    for number, piece in enumerate(order, 1):
        arrived = tmp_path / f"transfer-{number}"
        arrived.mkdir()
        shutil.copy(piece, arrived / f"renamed-{number}.bin")
        shutil.copy(packed / "manifest.json", arrived)
        code = run("collect", arrived, "--kit", kit)
        out = capsys.readouterr().out
        assert f"{number} of {len(order)} pieces are there" in out
        assert code == (0 if number == len(order) else common.INCOMPLETE)
        assert all((left.name in out) == (code != 0) for left in order[number:])
    assert run("status", "--kit", kit) == 0
    assert "0 of 5 wheels are joined" in capsys.readouterr().out
    assert run("join", "--kit", kit) == 0
    wheels = sorted(house.glob("*.whl"))
    assert {file.name: file.read_bytes() for file in (kit / "wheels").iterdir()} == {
        w.name: w.read_bytes() for w in wheels
    }
    assert not list(kit.rglob(".*"))


def test_the_same_wheels_give_the_same_pieces(house, packed, tmp_path):
    for file in house.iterdir():
        shutil.copy(file, tmp_path / "copy.whl")
        (tmp_path / "copy.whl").replace(file)  # another inode and another time
    again = pack(house, tmp_path / "again")
    assert [piece.read_bytes() for piece in pieces(again)] == [piece.read_bytes() for piece in pieces(packed)]
    one, two = (json.loads((folder / "manifest.json").read_text()) for folder in (packed, again))
    assert {**one, "made": 0, "digest": 0} == {**two, "made": 0, "digest": 0}


def test_a_kit_takes_the_place_of_an_older_one(house, packed):
    before = len(pieces(packed))
    make_wheel(house, "vllm")
    pack(house, packed)
    assert len(pieces(packed)) < before
    assert run("collect", packed, "--kit", packed) == 0


def flip(piece: Path) -> None:
    content = bytearray(piece.read_bytes())
    content[-1] ^= 1
    piece.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (flip, "broken: the digest is not that of kit-002.bin"),
        (
            lambda piece: piece.write_bytes(piece.read_bytes()[:-7]),
            "broken: kit-002.bin has 1,500 bytes, this has 1,493",
        ),
        (lambda piece: piece.write_bytes(b""), "no piece of a kit, or broken in its first bytes"),
        (lambda piece: piece.write_bytes(b"x" + piece.read_bytes()[1:]), "no piece of a kit, or broken in its first"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b" 00002\n", b" 00099\n", 1)), "it says it is piece 99"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b" 00002\n", b" 00001\n", 1)), "not that of kit-001.bin"),
    ],
)
def test_a_broken_piece_is_named_and_not_taken(packed, tmp_path, capsys, harm, told):
    arrived, kit = tmp_path / "arrived", tmp_path / "kit"
    shutil.copytree(packed, arrived)
    harm(arrived / "kit-002.bin")
    (arrived / "kit-001.bin").rename(arrived / "z.bin")  # after the broken one, whatever that claims to be
    assert run("collect", arrived, "--kit", kit) == common.INCOMPLETE
    printed = capsys.readouterr()
    assert "kit-002.bin: " in printed.err
    assert told in printed.err
    assert "missing: kit-002.bin\n" in printed.out
    assert run("join", "--kit", kit) == common.INCOMPLETE
    assert "pieces are missing: kit-002.bin. Collect them first" in capsys.readouterr().err
    assert not (kit / "wheels").exists()
    assert run("collect", packed / "kit-002.bin", "--kit", kit) == 0
    assert run("join", "--kit", kit) == 0


def test_a_piece_that_comes_twice_changes_nothing(packed, tmp_path, capsys):
    kit = tmp_path / "kit"
    assert run("collect", packed, "--kit", kit) == 0
    capsys.readouterr()
    before = {file: file.stat().st_mtime_ns for file in kit.iterdir()}
    assert run("collect", packed / "kit-001.bin", packed / "kit-001.bin", "--kit", kit) == 0
    assert "taken: 0 pieces, already there: 2" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in kit.iterdir()} == before


def test_pieces_and_manifests_of_another_kit_are_not_taken(house, packed, tmp_path, capsys):
    kit = tmp_path / "kit"
    assert run("collect", packed / "manifest.json", packed / "kit-000.bin", "--kit", kit) == common.INCOMPLETE
    make_wheel(house, "ray", "2.0")
    (house / "ray-1.0-py3-none-any.whl").unlink()
    other = pack(house, tmp_path / "other")
    ours, theirs = (json.loads((folder / "manifest.json").read_text())["kit"] for folder in (packed, other))
    own = (kit / "manifest.json").read_bytes()
    capsys.readouterr()
    assert run("collect", other, "--kit", kit) == common.INCOMPLETE
    printed = capsys.readouterr()
    assert f"kit-001.bin: a piece of another kit, {theirs}; this is {ours}" in printed.err
    assert f"manifest.json: of another kit, {theirs}; this is {ours}" in printed.err
    assert "taken: 0 pieces" in printed.out
    assert (kit / "manifest.json").read_bytes() == own


def test_a_collect_that_was_interrupted_goes_on(packed, tmp_path, monkeypatch, capsys):
    kit, copy, seen = tmp_path / "kit", shutil.copyfile, []

    def interrupted(source: Path, target: Path) -> None:
        seen.append(source)
        copy(source, target)
        if len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    assert run("collect", packed, "--kit", kit) == common.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.undo()
    assert sorted(file.name for file in kit.iterdir()) == ["kit-000.bin", "kit-001.bin", "manifest.json"]
    (kit / ".kit-002.bin.tmp").write_bytes(b"what a killed process leaves")
    assert run("collect", packed, "--kit", kit) == 0
    assert f"taken: {len(pieces(packed)) - 2} pieces, already there: 2" in capsys.readouterr().out
    assert not (kit / ".kit-002.bin.tmp").exists()


def test_pieces_that_lie_in_the_kits_folder_already(packed, capsys):
    assert run("collect", packed, "--kit", packed) == 0
    assert f"already there: {len(pieces(packed))}" in capsys.readouterr().out


def test_a_piece_that_breaks_after_it_was_collected_is_set_aside(packed, tmp_path, capsys):
    kit = tmp_path / "kit"
    run("collect", packed, "--kit", kit)
    flip(kit / "kit-003.bin")
    assert run("join", "--kit", kit) == common.INCOMPLETE
    assert "broken since they were collected: kit-003.bin. Bring them again" in capsys.readouterr().err
    assert run("status", "--kit", kit) == common.INCOMPLETE
    assert "missing: kit-003.bin\n" in capsys.readouterr().out
    assert run("collect", packed / "kit-003.bin", "--kit", kit) == 0
    assert run("join", "--kit", kit) == 0


@pytest.mark.parametrize(
    "harm",
    [
        flip,
        lambda piece: piece.write_bytes(b"x" + piece.read_bytes()[1:]),
        lambda piece: shutil.copyfile(piece.with_name("kit-000.bin"), piece),
    ],
    ids=("a byte", "its head", "another piece"),
)
def test_a_broken_piece_does_not_count_where_the_kit_is_collected_in_place(packed, tmp_path, capsys, harm):
    shutil.copytree(packed, tmp_path / "kit")
    harm(tmp_path / "kit" / "kit-003.bin")
    for command in (("collect", tmp_path / "kit"), ("collect", tmp_path / "kit"), ("status",)):
        assert run(*command, "--kit", tmp_path / "kit") == common.INCOMPLETE
        assert "missing: kit-003.bin\n" in capsys.readouterr().out
    assert run("collect", packed / "kit-003.bin", "--kit", tmp_path / "kit") == 0
    assert run("join", "--kit", tmp_path / "kit") == 0


def test_a_piece_in_its_place_that_is_refused_is_set_aside_and_not_lost(packed, capsys):
    flip(packed / "kit-003.bin")
    content = (packed / "kit-003.bin").read_bytes()
    assert run("collect", packed, "--kit", packed) == common.INCOMPLETE
    assert "kit-003.bin: broken: the digest is not that of kit-003.bin" in capsys.readouterr().err
    assert (packed / "kit-003.bin.broken").read_bytes() == content


def one_wheel_more(values: dict) -> None:
    values["wheels"][0]["sha256"] = "0" * 64


def outside(values: dict) -> None:
    values["wheels"][0]["name"] = "../../a-1.0-py3-none-any.whl"


def with_torch(values: dict) -> None:
    values["wheels"][0]["name"] = "torch-2.13.0-py3-none-any.whl"


def without_target(values: dict) -> None:
    del values["target"]


def of_another_format(values: dict) -> None:
    values["format"] = 2


@pytest.mark.parametrize(
    ("change", "name", "told"),
    [
        (one_wheel_more, False, "was changed after it was made"),
        (outside, True, "names a file that cannot be one of a kit"),
        (with_torch, True, "which must come with the torch that is there"),
        (without_target, True, "KeyError('target')"),
        (of_another_format, True, "has format 2; this script knows 1"),
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused(packed, tmp_path, capsys, change, name, told):
    remade(packed, change, name=name)
    assert run("collect", packed, "--kit", tmp_path / "kit") == common.WRONG_INPUT
    assert told in capsys.readouterr().err
    assert not list((tmp_path / "kit").iterdir())


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda text: text.replace('"torch": "2.11.0"', '"torch": "2.10.0"'), "is damaged, or was changed"),
        (lambda text: text[: len(text) // 2], "is damaged ("),
        (lambda text: "[]", "is not the manifest of a kit"),
    ],
)
def test_a_damaged_manifest_is_refused(packed, tmp_path, capsys, harm, told):
    file = packed / "manifest.json"
    whole = file.read_text()
    file.write_text(harm(whole))
    assert run("collect", packed, "--kit", tmp_path / "kit") == common.WRONG_INPUT
    assert told in capsys.readouterr().err
    file.write_text(whole)
    assert run("collect", packed, "--kit", tmp_path / "kit") == 0
    file.write_text(harm(whole))
    assert run("collect", packed, "--kit", tmp_path / "kit") == 0, "a damaged second copy loses nothing"
    assert told in capsys.readouterr().err


def test_a_manifest_whose_digests_are_wrong_though_they_fit_is_found_by_join(packed, tmp_path, capsys):
    name = json.loads((packed / "manifest.json").read_text())["kit"]
    remade(packed, one_wheel_more)
    fresh = json.loads((packed / "manifest.json").read_text())["kit"]

    def repacked(values: dict) -> None:
        for piece in values["pieces"]:
            file = packed / piece["name"]
            file.write_bytes(file.read_bytes().replace(name.encode(), fresh.encode(), 1))
            piece["sha256"] = common.sha256_of(file)

    remade(packed, repacked)
    assert run("collect", packed, "--kit", tmp_path / "kit") == 0
    assert run("join", "--kit", tmp_path / "kit") == common.WRONG_INPUT
    assert "pip-1.0-py3-none-any.whl: the digest differs" in capsys.readouterr().err
    assert not list((tmp_path / "kit" / "wheels").iterdir())


def test_without_a_manifest_or_with_a_name_that_is_not_there(packed, tmp_path, capsys):
    assert run("collect", packed / "kit-000.bin", "--kit", tmp_path / "kit") == common.WRONG_INPUT
    assert "copy manifest.json along" in capsys.readouterr().err
    assert run("collect", packed / "kit-999.bin", "--kit", tmp_path / "kit") == common.WRONG_INPUT
    assert "kit-999.bin is not there: name the files or folders that arrived" in capsys.readouterr().err
    for command in ("status", "join", "install"):
        assert run(command, "--kit", tmp_path / "none") == common.WRONG_INPUT


def test_a_disk_that_is_full_leaves_no_half_wheel(packed, tmp_path, monkeypatch, capsys):
    run("collect", packed, "--kit", tmp_path)
    whole = joining.wheel_bytes

    def full(kit: manifests.Kit, folder: Path, wheel: manifests.Wheel):
        yield from whole(kit, folder, wheel)
        if wheel.distribution == "verl":
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(joining, "wheel_bytes", full)
    assert run("join", "--kit", tmp_path) == common.FAILED
    assert "No space left on device" in capsys.readouterr().err
    left = sorted(file.name for file in (tmp_path / "wheels").iterdir())
    assert left == ["pip-1.0-py3-none-any.whl", "ray-1.0-py3-none-any.whl"]
    monkeypatch.undo()
    kept = (tmp_path / "wheels" / left[0]).stat().st_mtime_ns
    assert run("join", "--kit", tmp_path) == 0
    assert (tmp_path / "wheels" / left[0]).stat().st_mtime_ns == kept, "what was whole is not written again"


def test_too_little_room_is_told_before_the_first_wheel(packed, tmp_path, monkeypatch, capsys):
    run("collect", packed, "--kit", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    assert run("join", "--kit", tmp_path) == common.FAILED
    assert "are needed, and 0.0 MB are free" in capsys.readouterr().err
    assert not list((tmp_path / "wheels").iterdir())


def test_what_takes_long_says_how_long_it_will_take(packed, tmp_path, monkeypatch, capsys):
    run("collect", packed, "--kit", tmp_path)
    capsys.readouterr()
    run("join", "--kit", tmp_path)
    assert "left" not in capsys.readouterr().out, "quick work says nothing"
    shutil.rmtree(tmp_path / "wheels")
    monkeypatch.setattr(common, "TELL_EVERY", 0.0)
    run("join", "--kit", tmp_path)
    assert "joining: 0.0 MB of 0.0 MB, about 0 s left" in capsys.readouterr().out


def test_the_time_left_is_in_proportion(monkeypatch, capsys):
    clock = iter([100.0, 105.0, 130.0, 131.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = common.Progress("joining", 4_000_000)
    for size in (500_000, 500_000, 500_000):
        progress.add(size)
    assert capsys.readouterr().out == "joining: 1.0 MB of 4.0 MB, about 90 s left\n"
