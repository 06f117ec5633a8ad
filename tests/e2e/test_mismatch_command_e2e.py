"""``verl-fp16 mismatch`` with vLLM and verl's FSDP engine: interrupted, gone on with, and what rounding theory says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from verl_fp16.gap_report import folder
from verl_fp16.leftovers import shared_memory_files

PROMPTS, SAMPLES = 6, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("mismatch")
    (place / "prompts.txt").write_text("".join(f"{number}+{number}=\n" for number in range(PROMPTS)))
    return place


def start(model: Path, place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "verl_fp16.cli", "mismatch", str(model), "--prompts", str(place / "prompts.txt")]
    command += ["--samples", str(SAMPLES), "--lengths", "20:100", "--output", str(place / "out")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_interrupted_gone_on_with_and_what_theory_says(sharp_model, place):
    tokens = place / "out" / "tokens"
    shared_memory = shared_memory_files(Path("/dev/shm"))
    first = start(sharp_model, place)
    deadline = time.monotonic() + 300
    while not folder.parts(tokens / "bf16") and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.2)
    while not (tokens / "fp16").is_dir() and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.2)
    time.sleep(5)  # the next vLLM is on its way up
    tree = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=60)
    assert first.returncode == 130, told
    assert told.splitlines()[-1].startswith("verl-fp16: interrupted; what was done is in ")
    assert tree and not [child for child in psutil.wait_procs(tree, timeout=20)[1]], "no process is left"
    assert shared_memory_files(Path("/dev/shm")) == shared_memory
    sampled = {file: file.stat().st_mtime_ns for file in folder.parts(tokens / "bf16")}
    assert sampled

    again = start(sharp_model, place)
    out, told = again.communicate(timeout=500)
    assert again.returncode == 0, told
    assert {file: file.stat().st_mtime_ns for file in folder.parts(tokens / "bf16")} == sampled, "not done again"
    assert "Traceback" not in told and len(out.splitlines()) < 12, "vLLM's own lines go to the log"
    found = json.loads((place / "out" / "mismatch.json").read_text())["measurements"]
    rows = pq.read_table(place / "out" / "sequences.parquet").to_pylist()
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        assert found[name]["found"] == {"training": {"autocast": dtype, "weights": [dtype]}, "rollout": [dtype]}
        lengths = [row["length"] for row in rows if row["measurement"] == name]
        assert len(lengths) == PROMPTS * SAMPLES and 20 <= min(lengths) < 40 and 80 < max(lengths) <= 100
        assert found[name]["statistics"]["nonfinite_rollout"] == found[name]["statistics"]["nonfinite_training"] == 0
    factors = found["fp16"]["factors of bf16 over it"]
    assert 5 < factors["log_prob_abs_diff_mean"]["value"] < 12  # theory: 8
    assert 25 < factors["k3"]["value"] < 150  # theory: 64
    assert (place / "out" / "mismatch.png").read_bytes()[:4] == b"\x89PNG"
