"""``verl-fp16 selftest`` as a user starts it: every stage for real, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from verl_fp16.leftovers import shared_memory_files


@pytest.mark.slow
def test_a_machine_that_is_fit_passes_and_nothing_is_left(tmp_path):
    before = set(psutil.Process().children(recursive=True))
    shared_memory = shared_memory_files(Path("/dev/shm"))
    command = [sys.executable, "-m", "verl_fp16.cli", "selftest", "--json", "--record", "record.json", "-o", "out"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["rows"]}
    assert {row["status"] for row in rows.values()} == {"PASS"}, rows
    stages = {name.split()[0].rstrip(":") for name in rows}
    assert stages == {"device", "doctor", "model", "engine", "run", "gap", "throughput"}
    assert "3 steps of GRPO" in rows["run: finished"]["reason"]
    assert "1 actor, 1 rollout" in rows["run: dtypes"]["reason"]
    assert rows["device"]["reason"].startswith("CPU: ")
    assert "audited in each of 3 steps; the log-probabilities of a probe are" in rows["run: weight sync"]["reason"]
    assert found["hooks"] and found["versions"]["verl"]
    assert json.loads((tmp_path / "record.json").read_text())["rows"]
    assert "stage 5 of 5, gap" in done.stderr and "left" in done.stderr
    assert set(psutil.Process().children(recursive=True)) <= before
    fresh = {name for name in shared_memory_files(Path("/dev/shm")) if name not in shared_memory}
    assert not {name for name in fresh if name.startswith(("plasma", "psm_"))}
