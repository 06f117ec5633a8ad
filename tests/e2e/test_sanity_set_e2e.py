"""``verl-fp16 sanity-set`` with vLLM: what it samples is seeded, goes on after a stop, and is verl's data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from verl_fp16.quickstart.task import write_parquet

ANSWERS = 6
# Right for about half of a random model's answers, by nothing but their text.
REWARD = """
import zlib

def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float(zlib.crc32(solution_str.encode()) % 2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sanity-set")
    write_parquet(folder, seed=1, train_rows=24, held_out_pairs=16)
    (folder / "reward.py").write_text(REWARD)
    return folder


def run(model: Path, folder: Path, output: str, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "verl_fp16.cli", "sanity-set", str(model)]
    command += ["--data", str(folder / "train.parquet"), "--reward", f"{folder / 'reward.py'}:compute_score"]
    command += ["--output", str(folder / output), "--answers", str(ANSWERS), "--max-tokens", "4", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_set_is_made_in_two_goes(tiny_model, folder):
    for limit in ("--limit", "10"), ():
        done = run(tiny_model, folder, "set", *limit)
        assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "set" / "summary.json").read_text())
    assert summary["questions"] == 24 and summary["answers"] == 24 * ANSWERS and 0 < summary["kept"] <= 24
    kept = pq.read_table(folder / "set" / "train.parquet").to_pylist()
    assert len(kept) == summary["kept"] and all(0.2 <= row["accuracy"] <= 0.8 for row in kept)
    assert {"data_source", "prompt", "ability", "reward_model", "extra_info", "accuracy", "answers"} == set(kept[0])
    counted = [json.loads(line) for line in (folder / "set" / "progress.jsonl").read_text().splitlines()[1:]]
    assert sorted(row["row"] for row in counted) == list(range(24)) and len({row["correct"] for row in counted}) > 1
    assert {row["row"] for row in counted[:10]} == set(range(10)), "what was counted first is not counted again"
    assert (folder / "set" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
