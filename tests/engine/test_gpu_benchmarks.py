"""The benchmarks for GPUs on a CPU with a tiny model: every part gives its figures, and one that fails stops none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
HEAD = {"gpu", "driver", "date", "versions", "model", "parts"}


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu/run.py", "--device", "cpu", "--tiny", *arguments]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)


def parts_of(output: Path) -> dict:
    result = json.loads(output.read_text())
    assert result.keys() == HEAD and result["gpu"] == "cpu"
    assert result["model"]["layers"] == 2 and result["versions"]["torch"]
    return result["parts"]


def check(part: dict, base: str, *others: str) -> None:
    assert list(part["sides"]) == [base, *others] and part["pairs"] == 2
    for side in part["sides"].values():
        low, high = side["quartiles"]
        assert 0 < low <= side["median"] <= high
        assert side["peak_bytes"] >= 0
    assert list(part["ratios"]) == [f"{name} over {base}" for name in others]
    assert all(0 < row["median"] for row in part["ratios"].values())


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    output = tmp_path_factory.mktemp("tiny") / "result.json"
    before = sorted(RESULTS.iterdir())
    done = run("--only", "update,metrics,log_prob", "--output", str(output))
    assert sorted(RESULTS.iterdir()) == before
    return output, done


def test_engine_and_statistics_give_their_figures(measured):
    output, done = measured
    assert done.returncode == 0, done.stdout + done.stderr
    parts = parts_of(output)
    assert list(parts) == ["log_prob", "update", "metrics"], "in the order of the list, not of the command line"
    for name in ("log_prob", "update"):
        check(parts[name], "bfloat16", "float16")
        assert (parts[name]["unit"], parts[name]["tokens"], parts[name]["attention"]) == ("tokens/s", 64, "sdpa")
    assert parts["update"]["sides"]["float16"]["peak_bytes"] > 0
    assert parts["update"]["skipped_while_measured"] == 0
    check(parts["metrics"], "verl", "verl_fp16")
    assert parts["metrics"]["unit"] == "s"


def test_a_part_that_fails_is_told_and_the_others_are_kept(measured, tmp_path):
    output, _ = measured
    (vllm := tmp_path / "vllm").mkdir()
    (vllm / "__init__.py").write_text("raise ImportError('planted')")
    before = parts_of(output)
    result = tmp_path / "result.json"
    result.write_bytes(output.read_bytes())
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("--only", "rollout", "--output", str(result), env={"PYTHONPATH": path})
    assert done.returncode == 1 and "without figures: rollout" in done.stderr
    parts = parts_of(result)
    assert "vllm is needed to sample" in parts.pop("rollout")["failed"]
    assert parts == before


def test_what_was_measured_elsewhere_is_not_mixed_with_what_is_new(measured, tmp_path):
    output, _ = measured
    other = json.loads(output.read_text()) | {"gpu": "NVIDIA H100"}
    (result := tmp_path / "result.json").write_text(json.dumps(other))
    done = run("--only", "metrics", "--output", str(result))
    assert done.returncode == 2 and "another gpu" in done.stderr
    assert json.loads(result.read_text()) == other


@pytest.mark.parametrize(
    ("arguments", "told"),
    (
        (("--only", "rolout"), "rolout is no part"),
        (("--pairs", "1"), "quartiles need 2"),
        (("--model", "nowhere"), "no config.json"),
        (("--hidden", "100"), "a multiple of 128"),
        (("--output", "benchmarks/results/gpu-cpu.json"), "what a CPU gives is no result"),
    ),
)
def test_wrong_input_is_told_in_one_line(arguments, told):
    done = run(*arguments)
    assert done.returncode == 2
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_rollout_and_weight_sync_give_their_figures(tmp_path):
    output = tmp_path / "result.json"
    done = run("--only", "rollout,sync", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    parts = parts_of(output)
    check(parts["rollout"], "bfloat16", "float16", "float32")
    check(parts["sync"], "float32, plain verl", "float16")
    sent = {name: side["bytes"] for name, side in parts["sync"]["sides"].items()}
    assert sent["float32, plain verl"] == 2 * sent["float16"] > 0
