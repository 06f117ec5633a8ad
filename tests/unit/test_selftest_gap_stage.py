"""The self-test's stage gap with both sides faked: facts as its judgement takes them, and what is timed."""

from __future__ import annotations

import json
from pathlib import Path

import gap_fakes
import pytest

from verl_fp16.gap_report import driver, stage
from verl_fp16.gap_report.sides import Rollout
from verl_fp16.selftest import gap_stage
from verl_fp16.selftest.gap_rows import gap_rows, throughput_rows
from verl_fp16.selftest.rows import FAIL, PASS


@pytest.fixture
def spec(tmp_path, tiny_model, monkeypatch) -> dict:
    gap_fakes.put_in_place(monkeypatch)
    (tmp_path / "prompts.txt").write_text("".join(f"{number}+1=\n" for number in range(40)))
    given = {"model": str(tiny_model), "prompts": str(tmp_path / "prompts.txt")}
    return {"output": str(tmp_path), "device": "cpu", "gpus": 1, **given}


def facts(spec) -> dict:
    """As they come out of the stage's process."""
    return json.loads(json.dumps(gap_stage.run(spec, lambda _: None)))


def test_both_precisions_on_the_same_tokens_and_both_timed(spec):
    found = facts(spec)
    assert {row.status for row in gap_rows(found)} == {PASS}, gap_rows(found)
    assert found["measurements"]["bf16"]["tokens"] == found["measurements"]["fp16"]["tokens"] > 500
    assert {side: set(speeds) for side, speeds in found["speeds"].items()} == {
        "rollout": {"bf16", "fp16"},
        "training": {"bf16", "fp16"},
    }
    assert {row.status for row in throughput_rows(found)} == {PASS}
    work = Path(spec["output"]) / "gap"
    assert found["speeds"]["rollout"]["bf16"]["tokens"] == found["measurements"]["bf16"]["tokens"]
    # Without the first forward, and with the prompts.
    assert 0 < found["speeds"]["training"]["fp16"]["tokens"]
    assert sorted(path.name for path in (work / "tokens").iterdir()) == ["bf16", "fp16"]
    assert facts(spec)["measurements"] == found["measurements"], "an earlier one's parts are not gone on with"


def test_a_gap_that_is_not_smaller_fails(spec, monkeypatch):
    monkeypatch.setitem(gap_fakes.ERROR, "float16", gap_fakes.ERROR["bfloat16"])
    assert [row.status for row in gap_rows(facts(spec))] == [PASS, FAIL, FAIL]


def test_what_cannot_be_measured_is_a_reason(spec, tmp_path):
    (tmp_path / "prompts.txt").write_text("x" * 500 + "\n")
    found = facts(spec)
    assert "the prompt has 500 tokens" in found["failed"]
    assert [row.status for row in gap_rows(found)] == [FAIL]


def test_the_first_forward_is_not_timed(monkeypatch):
    now = iter([0.0, 5.0, 6.0, 6.0, 8.0])
    monkeypatch.setattr(stage.time, "monotonic", lambda: next(now))
    clock = stage._Clock()
    for tokens in (10, 20, 30):
        clock.start()
        clock.stop(tokens)
    assert (clock.tokens, clock.seconds) == (50, 3.0)


def test_without_being_asked_nothing_is_timed(spec, tmp_path):
    work = gap_stage.folder.WorkFolder(tmp_path / "untimed", {})
    gap_stage._write_prompts(tmp_path / "prompts.txt", Path(spec["model"]), 24, work.prompts)
    settings = driver.Settings(1, 24, None, 0, {}, {})
    driver.sample(Path(spec["model"]), work, [Rollout("fp16")], settings, lambda *_: None)
    assert driver.speed(work.tokens("fp16")) is None
    assert len(gap_fakes.FakeSampler.made) == 1
