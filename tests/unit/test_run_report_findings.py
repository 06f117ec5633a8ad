"""Where a run went wrong: each kind of finding where it is there, and none where it is not."""

from __future__ import annotations

import json
import random

import pytest
from report_runs import alarm, entry, loaded, write_evidence, write_log

from verl_fp16.run_report.findings import COLLAPSE_STEPS, Finding


def found(tmp_path, kind: str | None = None, steps=range(1, 101), **of_step) -> list[Finding]:
    findings = loaded(write_log(tmp_path / "run" / "metrics.jsonl", steps, **of_step)).findings
    return [finding for finding in findings if kind in (None, finding.kind)]


def test_a_healthy_run_has_none(tmp_path):
    noise = random.Random(0)
    assert found(tmp_path, score_mean=lambda step: 0.3 + step / 500 + noise.gauss(0, 0.05)) == []


def test_the_first_alarm_of_each_rule_is_told_with_its_advice_and_its_tokens(tmp_path):
    folder = tmp_path / "run"
    write_log(folder / "metrics.jsonl", range(1, 101), alarms=lambda step: float(step > 50))
    for step in (51, 60, 90):
        write_evidence(folder / "checkpoints", step, alarm(step))
    write_evidence(folder / "checkpoints", 70, alarm(70, "slope"))
    write_evidence(folder / "checkpoints", 100)
    first, second = loaded(folder / "metrics.jsonl").findings
    assert (first.step, first.kind) == (51, "alarm")
    assert first.text == (
        "alarm: mismatch/k3 is 6e-06 (2e-06 -> 6e-06; the rule is verl_fp16.mismatch.alarm_k3_jump); told again 2 "
        "times, last at step 90"
    )
    assert first.advice == "find what changed; see in which tokens with `verl-fp16 tokens FILE`"
    assert first.command == f"verl-fp16 tokens {folder}/checkpoints/verl_fp16/mismatch/step_000051"
    assert (second.step, "alarm_slope" in second.text, "again" in second.text) == (70, True, False)


def test_an_alarm_of_which_only_the_log_knows_is_told_by_its_step(tmp_path):
    (finding,) = found(tmp_path, "alarm", alarms=lambda step: float(step in (40, 41, 77)))
    assert finding.step == 40
    assert "in 3 steps, last at step 77" in finding.text


def test_evidence_of_another_run_or_of_steps_taken_anew_is_left_out(tmp_path):
    folder = tmp_path / "run"
    path = write_log(folder / "metrics.jsonl", range(1, 101), k3=lambda step: step * 1e-7)
    write_evidence(folder / "checkpoints", 50, alarm(50), scalars={"mismatch/k3": 51e-7})
    run = loaded(path)
    assert [finding for finding in run.findings if finding.kind == "alarm"] == []
    assert any("is of another run" in note for note in run.notes)
    write_evidence(folder / "checkpoints", 60, alarm(60), scalars={"mismatch/k3": 60 * 1e-7})
    run = loaded(path)
    assert [finding.step for finding in run.findings] == [60]
    assert any("1 of 2 folders of evidence left out" in note for note in run.notes)


def test_a_gradient_norm_that_is_not_finite_is_told_unless_its_update_was_skipped(tmp_path):
    (finding,) = found(
        tmp_path,
        grad_norm=lambda step: None if step in (20, 30, 31) else 1.0,
        skipped_steps=lambda step: float(step == 20),
    )
    assert (finding.step, finding.kind) == (30, "not finite")
    assert finding.text == "Gradient norm (actor/grad_norm) is not a finite number, and in 1 later step"


def test_a_gradient_norm_that_is_not_finite_is_told_of_a_run_without_a_scaler(tmp_path):
    (finding,) = found(tmp_path, grad_norm=lambda step: None if step == 7 else 1.0, skipped_steps=lambda _: "leave out")
    assert finding.step == 7


def test_other_metrics_that_are_not_finite_are_told_one_by_one(tmp_path):
    findings = found(tmp_path, score_mean=lambda step: None if step == 9 else 1, entropy=lambda step: None)
    assert [(finding.step, finding.text.split(" (")[0]) for finding in findings] == [
        (1, "Entropy of the policy"),
        (9, "Reward"),
    ]


def test_a_collapse_is_told_where_the_running_mean_is_below_half_of_its_best(tmp_path):
    (finding,) = found(tmp_path, score_mean=lambda step: 1.0 if step <= 60 else 0.0)
    # (20 - n) / 20 is below one half from the 11th step without a reward on, and by eight standard errors from the
    # 16th: 1 - 4/20 = 0.8, the error of 4 ones in 20 being 0.092.
    assert (finding.step, finding.kind) == (76, "reward")
    assert "1 at step 60; at the end it is 0" in finding.text


def test_a_collapse_that_went_away_says_so(tmp_path):
    (finding,) = found(tmp_path, score_mean=lambda step: 0.0 if 40 < step <= 70 else 1.0)
    assert finding.step == 56 and finding.text.endswith("above that half again")


@pytest.mark.parametrize(
    "reward",
    [
        lambda step: -0.1 if step < 50 else -0.9,  # half of a negative best says nothing
        lambda step: 0.8 if step <= 60 else 0.41,  # not half
        lambda step: 0.8 if step != 60 else 0.0,  # one bad step
    ],
)
def test_what_is_no_collapse(tmp_path, reward):
    assert found(tmp_path, score_mean=reward) == []


def test_short_runs_are_not_judged_for_a_collapse(tmp_path):
    assert found(tmp_path, steps=range(1, 2 * COLLAPSE_STEPS), score_mean=lambda step: float(step < 20)) == []


def test_a_reward_of_chance_alone_does_not_collapse(tmp_path):
    # Of five standard errors, one run in a hundred is told to have collapsed: the best mean is one of many.
    for seed in range(200):
        noise, level = random.Random(seed), 0.01 + seed / 200
        rewards = [max(0.0, noise.gauss(level, level / 2)) for _ in range(300)]
        assert found(tmp_path, steps=range(300), score_mean=rewards.__getitem__) == []


def test_updates_that_were_skipped_in_a_row_to_the_end_are_told_with_the_newest(tmp_path):
    folder = tmp_path / "run"
    path = write_log(folder / "metrics.jsonl", consecutive_skips=lambda step: 8.0 * step)
    record = {
        "time": "2026-01-01T00:00:00.000+00:00",
        "role": "actor",
        "update": 76,
        "kind": "gradient",
        "scale": 1.0,
        "scale_after": 1.0,
        "consecutive": 24,
        "gradients": [{"parameter": "w", "infinite": 2, "nan": 0, "elements": 9, "rank": 1}],
        "gradients_total": 1,
        "data_ranks": None,
        "traced": False,
        "modules": {},
    }
    write_evidence(folder / "checkpoints", 3)
    (folder / "checkpoints" / "verl_fp16" / "skips-actor.jsonl").write_text(
        json.dumps({**record, "update": 75}) + "\n" + json.dumps(record) + "\n" + json.dumps(record)[:-20]
    )
    (finding,) = loaded(path).findings
    assert (finding.step, finding.kind) == (3, "skips")
    assert finding.text == (
        "at the end 24 updates of the actor in a row were skipped: actor update 76 skipped (loss scale stays 1; skip "
        "24 in a row): the gradients overflowed: w on rank 1: 2 inf of 9"
    )


def test_few_skips_at_the_end_are_not_told(tmp_path):
    assert found(tmp_path, consecutive_skips=lambda step: 7.0) == []


def config(folder, steps) -> None:
    place = folder / "hydra" / ".hydra"
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(f"trainer:\n  total_training_steps: {steps}\n")


@pytest.mark.parametrize(("planned", "told"), [("4", True), ("3", False), ("null", False), ("[", False), ("x", False)])
def test_a_log_that_ends_before_the_steps_of_its_configuration(tmp_path, planned, told):
    folder = tmp_path / "run"
    path = write_log(folder / "metrics.jsonl", range(1, 4))
    config(folder, planned)
    findings = [finding.text for finding in loaded(path).findings]
    assert findings == ["the log ends at step 3 of 4: the run still goes on, was stopped, or died"] * told


def test_a_configuration_beside_several_logs_is_of_none_of_them(tmp_path):
    folder = tmp_path / "run"
    path = write_log(folder / "metrics-2.jsonl", range(1, 3))
    write_log(folder / "metrics-6.jsonl", range(1, 7))
    config(folder, 6)
    assert loaded(path).findings == ()


def test_a_log_that_ends_in_the_middle_of_a_line(tmp_path):
    path = write_log(tmp_path / "run" / "metrics.jsonl", range(1, 4))
    path.write_text(path.read_text() + entry(4, {"actor/entropy": 1.0})[:-5])
    (finding,) = loaded(path).findings
    assert (finding.step, finding.kind) == (3, "ended")
    assert "in the middle of a line, after step 3" in finding.text


def test_findings_are_in_the_order_of_their_steps(tmp_path):
    findings = found(
        tmp_path,
        grad_norm=lambda step: None if step == 90 else 1.0,
        alarms=lambda step: float(step == 95),
        score_mean=lambda step: float(step < 40),
    )
    assert [finding.kind for finding in findings] == ["reward", "not finite", "alarm"]
