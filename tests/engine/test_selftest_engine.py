"""The self-test's stage engine, really run: it passes where FP16 is in force, and fails where it is not."""

from __future__ import annotations

import pytest

from verl_fp16.selftest.engine_rows import engine_rows
from verl_fp16.selftest.engine_stage import run
from verl_fp16.selftest.rows import FAIL, PASS


@pytest.fixture
def rows(tiny_model, tmp_path, monkeypatch):
    """Runs the stage, and returns its rows by what they are of."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")

    def judged(gpus: int, **environment: str) -> dict:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        spec = {"model": str(tiny_model), "output": str(tmp_path), "device": "cpu", "gpus": gpus}
        told: list[str] = []
        found = engine_rows(run({**spec, "strategies": ["fsdp2"]}, told.append))
        assert told == ["fsdp2, training", "fsdp2, resuming"][: len(told)] and told
        # Checkpoints are large: only the logs stay.
        assert {path.suffix for path in tmp_path.iterdir()} == {".log"}
        return {row.name.removeprefix("engine fsdp2: "): row for row in found}

    return judged


def test_fp16_in_force_passes(rows):
    found = rows(1)
    assert {name: row.status for name, row in found.items()} == dict.fromkeys(
        ("dtypes", "loss", "skipped update", "loss scale", "resume"), PASS
    ), found
    assert found["loss scale"].reason == "halved, 1024 to 512"
    assert "to the bit" in found["resume"].reason


@pytest.mark.slow
def test_two_ranks_pass(rows):
    found = rows(2)
    assert {row.status for row in found.values()} == {PASS}, found
    assert "on one rank is skipped on all 2" in found["skipped update"].reason


def test_an_engine_without_this_package_fails(rows):
    found = rows(1, VERL_FP16_DISABLE="1")
    assert {name for name, row in found.items() if row.status == FAIL} >= {"dtypes", "skipped update", "loss scale"}
    assert "loss scaler ShardedGradScaler, wanted LossScaler" in found["dtypes"].reason
    assert "did not skip update 4" in found["skipped update"].reason


def test_a_rank_that_fails_is_the_reason(rows, tiny_model, tmp_path, monkeypatch):
    spec = {"model": str(tmp_path), "output": str(tmp_path), "device": "cpu", "gpus": 1, "strategies": ["fsdp2"]}
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    (row,) = engine_rows(run(spec, lambda _: None))
    assert row.status == FAIL and "rank 0 ended with code 1 (engine-fsdp2-first-0.log): " in row.reason
    assert "Error" in row.reason and row.log == "engine-fsdp2-first-0.log"
