"""``python -m verl_fp16.quickstart`` as a person meets it: a wrong override, Ctrl-C, a worker that dies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from shared_memory import left_shared_memory

SHORT = (
    "trainer.total_training_steps=3",
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    "trainer.val_before_train=false",
)


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "verl_fp16.quickstart", "--output", str(folder), "--", *SHORT, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(what: str, condition, process: subprocess.Popen, seconds: float = 300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        assert process.poll() is None, f"ended before {what}: {process.stdout.read()}"
        time.sleep(0.5)
    process.kill()
    raise AssertionError(f"{what} did not come within {seconds} s")


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def assert_all_gone(started: set[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(list(started), timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert left_shared_memory() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    ((("trainer.total_steps=3",), "total_steps"), (("verl_fp16.loss_scale.init=-1",), "loss_scale.init")),
)
def test_a_wrong_override_ends_it_before_anything_is_made(tmp_path, arguments, message):
    process = start(tmp_path / "out", *arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_interrupted_run_leaves_nothing_and_says_so(tmp_path):
    process = start(tmp_path)
    seen: set[psutil.Process] = set()

    def rollout_is_starting():
        seen.update(descendants(process))
        return any("vLLMHttpServer" in " ".join(p.cmdline()) for p in seen if p.is_running())

    wait_for("vLLM's server", rollout_is_starting, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in output
    assert "Traceback" not in output
    assert len(seen) > 5
    assert_all_gone(seen)


def test_a_dead_rollout_worker_ends_the_run_with_its_name(tmp_path):
    """verl's trainer alone waits forever for the answers of a vLLM engine that is gone."""
    process = start(tmp_path, "trainer.total_training_steps=500")
    seen: set[psutil.Process] = set()

    def first_step_is_logged():
        seen.update(descendants(process))
        metrics = tmp_path / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") >= 1

    wait_for("the first step", first_step_is_logged, process)
    engines = [p for p in seen if p.is_running() and "EngineCore" in " ".join(p.cmdline())]
    assert engines
    engines[0].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert time.monotonic() - killed < 90
    assert process.returncode == 1
    assert "EngineCore" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["completed"] is False
    assert "EngineCore" in summary["cause"]
    assert_all_gone(seen)


@pytest.mark.slow
@pytest.mark.parametrize("seed", (1, 2, 3))
def test_validation_accuracy_rises_by_twenty_points(tmp_path, seed):
    command = [sys.executable, "-m", "verl_fp16.quickstart", "--seed", str(seed), "--output", str(tmp_path)]
    subprocess.run(command, check=True, timeout=900)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0.2 <= summary["accuracy_before"] <= 0.6
    assert summary["accuracy_after"] - summary["accuracy_before"] >= 0.2
    assert summary["seconds"] < 600
