"""Data and a model that are not there: verl's launcher says so before Ray starts."""

from __future__ import annotations

import os
import subprocess
import sys


def test_what_is_not_there_is_told_with_the_command_that_makes_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "quickstart", "quickstart_dir=mine"],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "ray init kwargs" not in done.stdout, "Ray was about to start"
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.endswith("python -m verl_fp16.quickstart.make mine")]
    assert [line.partition(":")[0] for line in told] == [
        "data.train_files",
        "data.val_files",
        "actor_rollout_ref.model.path",
    ]
