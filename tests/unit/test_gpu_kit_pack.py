"""What a carry kit holds: everything that is asked for, but not torch, nor what is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import gpu_kit
import gpu_kit_pins as pins
import gpu_kit_wheels
import pytest
from gpu_kit_fakes import PYTHON, TORCH, make_house, make_sdist, make_wheel, pack
from gpu_kit_there import common
from gpu_kit_there.manifest import read_manifest
from packaging.requirements import Requirement

from verl_fp16.doctor.packages import requirements

pytestmark = pytest.mark.unit

WANTED = gpu_kit_wheels.Wanted(PYTHON, TORCH, "0.24.0", glibc="2.10")


def names(packed: Path) -> set[str]:
    return {wheel["name"].split("-")[0] for wheel in manifest(packed)["wheels"]}


def manifest(packed: Path) -> dict:
    return json.loads((packed / "manifest.json").read_text())


def refused(house: Path, output: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the command says on stderr when it refuses, which leaves no kit."""
    command = ["pack", "--output", str(output), "--wheels", str(house), "--offline", "--glibc", "2.10"]
    assert gpu_kit.main([*command, "--python", PYTHON, *options]) == common.WRONG_INPUT
    assert not list(output.glob("kit-*"))
    return capsys.readouterr().err


def test_the_pins_are_those_of_the_verl_that_is_carried():
    """verl's own extra vllm says which torch, vLLM and transformers go together."""
    theirs = requirements("verl", "vllm")
    ours = requirements("verl-fp16", "cpu")
    assert metadata.version("verl") in ours["verl"]
    assert str(theirs["torch"]) == f"=={pins.TORCH}"
    assert str(theirs["vllm"]) == f"=={pins.VLLM}"
    assert str(ours["transformers"]) in str(theirs["transformers"]).split(",")
    assert set(pins.CPU_ONLY) <= set(ours)


def test_the_table_says_what_is_in_the_kit(tmp_path, capsys):
    house = make_house(tmp_path / "house")
    requires = [f"torch=={TORCH}", "nvidia-cublas"]
    make_wheel(house, "vllm", requires=requires, files={"vllm/__init__.py": "#" * 200_000})
    packed = pack(house, tmp_path / "kit", piece=0.15)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["wheel", "size"]
    assert lines[1].split() == ["vllm-1.0-py3-none-any.whl", "0.2", "MB"]
    assert lines[-2] == f"left to torch {TORCH}: nvidia-cublas, torch"
    assert lines[-1] == f"kit {manifest(packed)['kit']}: 5 wheels, 0.2 MB, 2 pieces of 0.1 MB at most"
    assert manifest(packed)["pins"] == {"ray": "1.0", "verl": "1.0", "verl-fp16": "1.0", "vllm": "1.0"}
    script = packed / "gpu_kit_there.pyz"
    told = subprocess.run([sys.executable, "-I", script, "status", "--kit", packed], capture_output=True, text=True)
    assert told.stdout.startswith(f"kit {manifest(packed)['kit']}: 2 of 2 pieces are there"), told.stderr
    gpu_kit.write_script(tmp_path / "again.pyz")
    assert script.read_bytes() == (tmp_path / "again.pyz").read_bytes(), "the same bytes each time"


def test_torch_and_what_comes_with_it_are_never_packed(tmp_path):
    house = make_house(tmp_path / "house")
    for name in ("torch", "triton", "nvidia-cutlass-dsl", "cuda-bindings"):
        make_wheel(house, name, TORCH)
    make_wheel(
        house, "verl", requires=["triton", "nvidia-cutlass-dsl", "nvidia-cudnn-cu13==9.1", "cuda-bindings", "ray"]
    )
    packed = pack(house, tmp_path / "kit")
    assert names(packed) == {"ray", "verl", "verl_fp16", "vllm", "pip", "nvidia_cutlass_dsl", "cuda_bindings"}
    assert manifest(packed)["held"] == ["nvidia-cublas", "nvidia-cudnn-cu13", "torch", "triton"]


def test_what_cuda_vllm_was_built_for_is_read_from_its_wheel(tmp_path, capsys):
    house = make_house(tmp_path / "house")
    library = "x" * (2**21 - 8) + "\0libcudart.so.13\0" + "x" * 99  # across two blocks
    files = {"vllm/_C_new.abi3.so": library, "vllm/_moe_C.abi3.so": "libcudart.so.11", "vllm/__init__.py": ""}
    make_wheel(house, "vllm", requires=[f"torch=={TORCH}"], files=files)
    packed = pack(house, tmp_path / "kit", piece=55)
    assert (manifest(packed)["cuda"], manifest(packed)["extensions"]) == ("13", ["vllm._C_new"])
    assert "vllm is built for CUDA 13" in capsys.readouterr().out
    assert read_manifest(packed / "manifest.json").extensions == ("vllm._C_new",)


def test_a_vllm_that_names_no_cuda_is_told(tmp_path, capsys):
    house = make_house(tmp_path / "house")
    packed = pack(house, tmp_path / "kit")
    assert (manifest(packed)["cuda"], manifest(packed)["extensions"]) == (None, [])
    present = tmp_path / "present"
    present.write_text(f"vllm==1.0\ntorch=={TORCH}\n")
    assert "vllm" not in names(pack(house, tmp_path / "kit", "--present", str(present)))
    assert "no wheel of vllm says what CUDA it is built for" in capsys.readouterr().out


def test_what_is_there_and_satisfies_is_left_out(tmp_path):
    house = make_house(tmp_path / "house")
    for name, version in (("numpy", "2.3.5"), ("transformers", "5.9.0"), ("torchvision", "0.26.0")):
        make_wheel(house, name, version)
    make_wheel(house, "verl", requires=["numpy", "transformers==5.9.0", "torchvision", "ray"])
    there_now = tmp_path / "freeze.txt"
    lines = ["numpy==2.3.5", "transformers==5.17.0", "pip==1.0", "torchvision==0.26.0+cu130", f"Torch=={TORCH}+cu130"]
    there_now.write_text("# a comment\nsomething @ file:///srv/x.whl\n" + "\n".join(lines))
    packed = pack(house, tmp_path / "kit", "--present", str(there_now))
    assert names(packed) == {"ray", "verl", "verl_fp16", "vllm", "pip", "transformers"}
    assert manifest(packed)["there"] == {"numpy": "2.3.5", "torchvision": "0.26.0"}


def test_a_freeze_tells_of_editable_packages_in_comments(tmp_path):
    """What pip prints of packages that are installed from a folder: a comment, and the folder in the next line."""
    freeze = tmp_path / "freeze.txt"
    freeze.write_text(
        "# Editable install with no version control (my.Tool==0.1.0)\n-e /srv/tool\n"
        "# Editable Git install with no remote (verl==0.9.1)\n-e /srv/verl\n"
        "# Editable Git install (ray==2.60.0) with either a deleted local remote or invalid URI:\n"
        "# 'gone'\n-e /srv/ray\n"
        "## left by hand: numpy==1.0\n"
        f"numpy==2.3.5\ntorch=={TORCH}+cu130\n"
    )
    found = gpu_kit_wheels.read_present(freeze)
    others = {"numpy": "2.3.5", "torch": f"{TORCH}+cu130"}
    assert found == {"my-tool": "0.1.0", "verl": "0.9.1", "ray": "2.60.0", **others}


def test_what_is_there_need_not_be_in_the_folder(tmp_path, capsys):
    house = make_house(tmp_path / "house")
    make_wheel(house, "verl", requires=["numpy<2.5", "ray"])
    present = tmp_path / "present.json"
    for version, code in (("2.4.1", 0), ("2.5.2", common.WRONG_INPUT)):
        rows = [{"name": "numpy", "version": version}, {"name": "torch", "version": TORCH}]
        present.write_text(json.dumps(rows))
        command = ["pack", "--output", str(tmp_path / "kit"), "--wheels", str(house), "--offline", "--python", PYTHON]
        assert gpu_kit.main([*command, "--present", str(present)]) == code
    assert "verl 1.0 needs numpy<2.5, and it is 2.5.2" in capsys.readouterr().err


def test_a_need_that_nothing_meets_is_refused(tmp_path, capsys):
    house = make_house(tmp_path / "house")
    requires = ["a[x]", "ray>=2", "c; sys_platform == 'win32'", "d; extra == 'y'", f"e; python_version == '{PYTHON}'"]
    make_wheel(house, "verl", requires=requires)
    make_wheel(house, "a", requires=["b; extra == 'x'", "f; extra == 'z'"])
    message = refused(house, tmp_path / "kit", capsys)
    assert message.splitlines() == [
        "gpu-kit: the kit would not work:",
        "  a 1.0 needs b, which is nowhere",
        "  verl 1.0 needs ray>=2, and it is 1.0",
        "  verl 1.0 needs e, which is nowhere",
    ]
    make_wheel(house, "ray", "2.0")
    (house / "ray-1.0-py3-none-any.whl").unlink()
    packed = pack(house, tmp_path / "kit", "--without", "b", "--without", "E")
    assert manifest(packed)["without"] == ["b", "e"]


def test_a_kit_without_what_it_is_for_is_refused(tmp_path, capsys):
    house = make_house(tmp_path / "house")
    (house / "ray-1.0-py3-none-any.whl").unlink()
    make_wheel(house, "verl")
    assert "it needs ray" in refused(house, tmp_path / "kit", capsys)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            '[{"name": "torch", "version": "2.10.0+cu130"}]',
            f"has torch 2.10.0+cu130, and the kit would be for torch {TORCH}",
        ),
        ("numpy==2.3.5", "has no torch"),
        ("", "there is no package in it"),
        ('[{"nome": 1}]', "this is not what pip list --format=json prints"),
        ("[", "this is not what pip list --format=json prints"),
        ("torch==one", "this is not what pip list --format=json prints"),
        (None, "No such file"),
    ],
)
def test_a_list_of_what_is_there_that_cannot_be_used(tmp_path, capsys, text, told):
    house = make_house(tmp_path / "house")
    file = tmp_path / "present"
    if text is not None:
        file.write_text(text)
    message = refused(house, tmp_path / "kit", capsys, "--present", str(file))
    assert told in message
    assert message.startswith("gpu-kit: --present")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--python", "3.9"), "--python 3.9"),
        (("--glibc", "musl"), "--glibc musl"),
        (("--torch", "latest"), "--torch latest"),
        (("--vllm", ">=0.24"), "--vllm >=0.24"),
        (("--piece-mb", "0.00001"), "--piece-mb: a piece needs"),
    ],
)
def test_wrong_options_are_named(tmp_path, capsys, options, told):
    assert told in refused(make_house(tmp_path / "house"), tmp_path / "kit", capsys, *options)


def test_wrong_folders_are_named(tmp_path, capsys):
    assert "there is no wheel in" in refused(tmp_path / "none", tmp_path / "kit", capsys)
    house = make_house(tmp_path / "house")
    make_wheel(house, "ray", "2.0")
    assert "has several wheels of ray" in refused(house, tmp_path / "kit", capsys)
    (house / "ray-2.0-py3-none-any.whl").write_bytes(b"PK half of it")
    assert "ray-2.0-py3-none-any.whl is no whole wheel" in refused(house, tmp_path / "kit", capsys)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of the names that are asked for, all that pip and uv can see."""
    links = tmp_path / "links"
    ours = gpu_kit_wheels.read_wheel(make_wheel(tmp_path / "ours", "verl-fp16", "0", metadata.requires("verl-fp16")))
    for line in map(Requirement, gpu_kit_wheels.requirements(ours, WANTED)):
        version = next((s.version for s in line.specifier if s.operator in ("==", ">=")), "1.0")
        extra = {"omegaconf": ["antlr4-python3-runtime==4.9.*"], "torch": ["nvidia-cublas", "cuda-bindings<14"]}
        make_wheel(links, line.name, version, extra.get(line.name, ["numpy>=2"] if line.name == "verl" else []))
    make_wheel(links, "vllm", "0.24.0", [f"torch=={TORCH}", "nvidia-cutlass-dsl", "numpy<2.4"])
    for name, version in (("nvidia-cublas", "13"), ("nvidia-cutlass-dsl", "4"), ("cuda-bindings", "13.4")):
        make_wheel(links, name, version)
    for version in ("2.2.0", "2.3.5", "2.5.2"):
        make_wheel(links, "numpy", version)
    make_sdist(links, "antlr4-python3-runtime", "4.9.3")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def test_resolved_fetched_and_built(index, tmp_path, capsys):
    """By the real uv and the real pip, with this package's own wheel."""
    present = tmp_path / "present"
    present.write_text(f"torch=={TORCH}+cu130\nnumpy==2.2.0\ntransformers==5.17.0\n")
    command = [
        "pack",
        "--output",
        str(tmp_path / "kit"),
        "--python",
        PYTHON,
        "--glibc",
        "2.28",
        "--present",
        str(present),
    ]
    assert gpu_kit.main(command) == 0
    printed = capsys.readouterr().out
    values = manifest(tmp_path / "kit")
    files = {wheel["name"] for wheel in values["wheels"]}
    assert "antlr4_python3_runtime-4.9.3-py3-none-any.whl" in files, "built from its sources"
    assert {"nvidia_cutlass_dsl-4-py3-none-any.whl", "cuda_bindings-13.4-py3-none-any.whl"} <= files
    assert values["held"] == ["nvidia-cublas", "torch"]
    assert values["there"] == {"numpy": "2.2.0"}, "kept, though there is a newer one that would do"
    assert values["pins"]["transformers"] == "5.9.0"
    assert f"verl_fp16-{metadata.version('verl-fp16')}-py3-none-any.whl" in files
    assert "there already: numpy 2.2.0" in printed

    shutil.rmtree(index)  # all is kept, and what was fetched is not fetched again
    kept = tmp_path / "kit" / "wheels"
    assert gpu_kit.main([*command, "--offline"]) == 0
    assert manifest(tmp_path / "kit")["wheels"] == values["wheels"]
    before = {file.name: file.stat().st_mtime_ns for file in kept.iterdir()}
    packages = {"ray": "1.0", "verl": "0.9.1"}
    assert [file.name[:4] for file in gpu_kit_wheels.fetch(packages, WANTED, kept)] == ["ray-", "verl"]
    assert {file.name: file.stat().st_mtime_ns for file in kept.iterdir()} == before


def test_what_cannot_be_resolved_is_told_in_uvs_words(index, tmp_path, capsys):
    (index / "ray-1.0-py3-none-any.whl").unlink()
    code = gpu_kit.main(["pack", "--output", str(tmp_path / "kit"), "--python", PYTHON, "--glibc", "2.28"])
    assert code == common.WRONG_INPUT
    message = capsys.readouterr().err
    assert "the packages cannot be resolved" in message
    assert "ray" in message
    assert not list((tmp_path / "kit").glob("kit-*"))


def test_what_pip_cannot_fetch_is_told_and_what_it_could_is_kept(index, tmp_path):
    house = tmp_path / "house"
    house.mkdir()
    (house / ".fetching-killed").mkdir()
    gpu_kit_wheels.fetch({"ray": "1.0"}, WANTED, house)
    with pytest.raises(common.KitError, match="pip could not fetch one of verl: (?s:.*)No matching distribution"):
        gpu_kit_wheels.fetch({"ray": "1.0", "verl": "7.7"}, WANTED, house)
    assert [file.name for file in house.iterdir()] == ["ray-1.0-py3-none-any.whl"]


def test_sources_that_would_be_built_for_this_machine_alone_are_refused(tmp_path):
    sources = make_sdist(tmp_path, "antlr4-python3-runtime", "4.9.3", tag="cp312-cp312-linux_x86_64")
    with pytest.raises(
        common.KitError, match="antlr has no wheel, and .*-linux_x86_64.whl, built here, would be for this"
    ):
        gpu_kit_wheels._build([str(sources), "--no-build-isolation"], "antlr", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [sources.name]


def test_the_command_line_runs_from_anywhere(tmp_path):
    script = Path(gpu_kit.__file__)
    process = subprocess.run([sys.executable, script, "pack", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0
    assert f"the version to carry [{pins.VLLM}]" in process.stdout
