"""The self-test's stage gap with both sides faked: facts as its judgement takes them, and what is timed."""

from __future__ import annotations

import json
from pathlib import Path

import gap_fakes
import pytest

from verl_fp16.gap_report import driver, timing
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
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(now))
    clock = timing.Forwards()
    for tokens in (10, 20, 30):
        clock.start()
        clock.stop(tokens)
    assert (clock.tokens, clock.seconds) == (50, 3.0)


def test_of_several_passes_the_fastest_counts():
    passes = timing.Passes(least_s=5.0)
    assert not passes.enough and passes.found() is None
    for tokens, seconds in ((100, 2.0), (200, 2.0), (90, 1.5)):
        assert not passes.enough
        passes.add(tokens, seconds)
    assert passes.enough and passes.found() == {"tokens": 200, "seconds": 2.0, "timed_s": 5.5}
    once = timing.Passes(least_s=0.0)
    assert not once.enough, "one pass is made in any case"
    once.add(0, 0.0)
    assert once.enough and once.found() is None, "of nothing there is no speed"


def test_on_a_gpu_a_full_batch_comes_first_and_passes_go_on_for_a_while(spec, monkeypatch):
    asked, kept = [], gap_fakes.FakeSampler.sample

    def sample(self, requests):
        requests = list(requests)
        asked.append((self.dtype, requests))
        return kept(self, requests)

    monkeypatch.setattr(gap_fakes.FakeSampler, "sample", sample)
    monkeypatch.setitem(gap_stage._LENGTHS, "gpu", (24, 40))
    monkeypatch.setattr(gap_stage, "_TIMED_S", {"cpu": 0.0, "gpu": 0.2})
    monkeypatch.setattr(gap_stage, "has_flash_attention", lambda: True)
    found = facts({**spec, "device": "gpu"})
    for dtype in ("bfloat16", "float16"):
        warm, first, second = [requests for one, requests in asked if one == dtype][:3]
        assert len(warm) == len(first) == 80 and {len(request.tokens) + request.length for request in warm} == {9}
        assert [request.tokens for request in first] == [request.tokens for request in second]
    assert found["measurements"]["bf16"]["tokens"] == found["speeds"]["rollout"]["bf16"]["tokens"], "kept once"
    speeds = [found["speeds"][side][name] for side in ("rollout", "training") for name in ("bf16", "fp16")]
    assert all(one["timed_s"] >= 0.2 > one["seconds"] > 0 for one in speeds), speeds


@pytest.mark.parametrize("flash", (True, False))
def test_without_flash_attention_the_log_prob_pass_is_a_loop_over_tokens(spec, monkeypatch, flash):
    monkeypatch.setattr(gap_stage, "has_flash_attention", lambda: flash)
    assert facts(spec)["token_loop"] is not flash
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    assert gap_stage.loops_over_tokens() is True


def test_without_being_asked_nothing_is_timed(spec, tmp_path):
    work = gap_stage.folder.WorkFolder(tmp_path / "untimed", {})
    gap_stage._write_prompts(tmp_path / "prompts.txt", Path(spec["model"]), 24, work.prompts)
    settings = driver.Settings(1, 24, None, 0, {}, {})
    driver.sample(Path(spec["model"]), work, [Rollout("fp16")], settings, lambda *_: None)
    assert driver.speed(work.tokens("fp16")) is None
    assert len(gap_fakes.FakeSampler.made) == 1
