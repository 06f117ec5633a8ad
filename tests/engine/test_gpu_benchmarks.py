"""The benchmarks for GPUs on a CPU with a tiny model: every part gives its figures, and one that fails stops none."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import verl_fp16

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
HEAD = {"gpu", "driver", "date", "versions", "commit", "model", "parts"}


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu/run.py", "--device", "cpu", "--tiny", *arguments]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)


def parts_of(output: Path) -> dict:
    result = json.loads(output.read_text())
    assert result.keys() == HEAD and result["gpu"] == "cpu"
    assert result["model"]["layers"] == 2 and result["versions"]["torch"]
    assert result["versions"]["verl_fp16"] == verl_fp16.__version__
    return result["parts"]


def check(part: dict, base: str, *others: str, memory: bool = True) -> None:
    assert list(part["sides"]) == [base, *others] and part["pairs"] == 2
    for side in part["sides"].values():
        low, high = side["quartiles"]
        assert 0 < low <= side["median"] <= high
        assert side["peak_bytes"] >= 0 if memory else "peak_bytes" not in side
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
        assert parts[name]["log_probs"] == "verl's fused kernels (torch)"
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
    assert "vllm is needed to sample (planted)" in parts.pop("rollout")["failed"]
    assert parts == before


def test_what_was_measured_elsewhere_is_not_mixed_with_what_is_new(measured, tmp_path):
    output, _ = measured
    other = json.loads(output.read_text()) | {"gpu": "NVIDIA H100"}
    (result := tmp_path / "result.json").write_text(json.dumps(other))
    done = run("--only", "metrics", "--output", str(result))
    assert done.returncode == 2 and "another gpu" in done.stderr
    assert json.loads(result.read_text()) == other


def test_a_result_names_the_commit_of_the_checkout_that_made_it(benchmark, tmp_path):
    commit = benchmark("facts").commit
    root = tmp_path / "checkout"
    (root / "inside").mkdir(parents=True)
    assert commit(root) is None
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (root / "file").write_text("one")
    (root / "README.md").write_text("one")
    subprocess.run([*git, "add", "file", "README.md"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "one"], check=True)
    (root / "untracked").touch()
    (root / "README.md").write_text("what the result says")
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert commit(root) == head and len(head) == 40
    (root / "file").write_text("two")
    assert commit(root) == f"{head} with changes"
    assert commit(root / "inside") is None, "a folder in somebody else's checkout is none of ours"


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


def test_a_part_that_fails_is_told_with_the_first_error_and_the_last(benchmark, tmp_path):
    """vLLM's last word is that its engine did not start, see above."""
    lines = [
        "INFO x",
        "(EngineCore pid=7) ValueError: no room",
        "RuntimeError: other",
        "RuntimeError: see above",
        "bye",
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    told = benchmark("run")._reason(tmp_path / "log", 1)
    assert told == "exit code 1: EngineCore: ValueError: no room ... RuntimeError: see above"


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the benchmarks, by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    return importlib.import_module


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(benchmark, tmp_path, monkeypatch):
    """vLLM's engine is a process of its own, and may be in a session of its own."""
    run_module = benchmark("run")
    (vllm := tmp_path / "vllm").mkdir()
    (vllm / "__init__.py").write_text(
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(300)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(run_module, "PART_TIMEOUT_S", 20)
    settings = run_module.Settings("nowhere", "cpu", 2)
    found = run_module.run_part("rollout", settings, tmp_path)
    assert "took longer than 20 s" in found["failed"]
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_receiver_that_ends_while_weights_are_sent_is_noticed(tmp_path):
    """verl's sender waits for an answer without a limit."""
    code = (
        "import subprocess, sys, zmq\n"
        "from sync_part import while_it_runs\n"
        "process = subprocess.Popen(['sh', '-c', 'sleep 1; exit 3'])\n"
        "socket = zmq.Context.instance().socket(zmq.REQ)\n"
        f"socket.bind('ipc://{tmp_path}/socket')\n"
        "assert while_it_runs(subprocess.Popen(['sleep', '5']), lambda: 7) == 7\n"
        "while_it_runs(process, lambda: (socket.send(b'weights'), socket.recv()))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks" / "gpu")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "RuntimeError: vLLM ended with exit code 3 while weights were sent"


def test_what_fails_while_weights_are_sent_is_raised(benchmark):
    process = subprocess.Popen(["sleep", "5"])
    with pytest.raises(ZeroDivisionError):
        benchmark("sync_part").while_it_runs(process, lambda: 1 / 0)
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("device", "flash", "off", "tied", "way"),
    (
        ("cuda", True, "0", False, "FLASH"),
        ("cuda", True, "1", True, "FUSED"),
        ("cuda", False, "0", True, "FUSED"),
        ("cuda", False, "0", False, "LOOP"),
        ("cpu", True, "0", True, "FUSED"),
    ),
)
def test_log_probs_come_from_a_loop_over_tokens_only_where_nothing_else_does(
    benchmark, tmp_path, monkeypatch, device, flash, off, tied, way
):
    parts = benchmark("engine_parts")
    from transformers import Qwen3Config
    from verl.utils import torch_functional

    monkeypatch.setattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", flash)
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", off)
    Qwen3Config(tie_word_embeddings=tied).save_pretrained(tmp_path)
    found = parts.log_prob_way(benchmark("measure").Settings(str(tmp_path), device, 2))
    assert found == getattr(parts, way)


@pytest.mark.parametrize("part", ("log_prob", "update"))
def test_the_log_prob_pass_and_the_update_do_without_verls_loop(benchmark, tmp_path, part):
    benchmark("facts").make_model(tmp_path / "model", 2, 128, None)
    code = (
        "import engine_parts\n"
        "from measure import Settings, TINY\n"
        "from verl.utils import torch_functional as functional\n"
        "def loop(*_): raise AssertionError('one token at a time')\n"
        "functional.logprobs_from_logits_v2 = loop\n"
        f"print(engine_parts.{part}(Settings({str(tmp_path / 'model')!r}, 'cpu', 2, **TINY))['log_probs'])\n"
    )
    path = os.pathsep.join([str(ROOT / "benchmarks" / "gpu"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "VERL_PLATFORM": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "verl's fused kernels (torch)"


@pytest.mark.slow
def test_rollout_and_weight_sync_give_their_figures(tmp_path):
    output = tmp_path / "result.json"
    done = run("--only", "rollout,sync", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    parts = parts_of(output)
    # vLLM takes the share of the memory that it is given, whatever the dtype.
    check(parts["rollout"], "bfloat16", "float16", "float32", memory=False)
    check(parts["sync"], "float32, plain verl", "float16")
    sent = {name: side["bytes"] for name, side in parts["sync"]["sides"].items()}
    assert sent["float32, plain verl"] == 2 * sent["float16"] > 0
