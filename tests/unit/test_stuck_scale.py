"""The stop of a run whose scaler skips every update: when, and what it says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from verl_fp16.hooks import stuck_scale
from verl_fp16.training_step import StepRecord, TrainingStopped

SKIP = {"kind": "gradient", "consecutive": 5}


def step(consecutive: float = 5.0, role: str = "actor", **scale) -> StepRecord:
    config = OmegaConf.create({"verl_fp16": {"loss_scale": {"max_consecutive_skips": 5, **scale}}})
    return StepRecord(9, {f"{role}/consecutive_skips": consecutive}, SimpleNamespace(config=config))


def reports(monkeypatch, *fields: dict, role: str = "actor") -> list:
    asked = []

    def answers(trainer, timeout_s):
        asked.append(timeout_s)
        said = {"scale": 1.0, "last_skip": SKIP, "last_skip_line": "LINE"}
        return [(role, {**said, **each}) for each in fields], ["training worker 0: no answer"]

    monkeypatch.setattr(stuck_scale, "_reports", answers)
    return asked


def test_below_the_limit_no_worker_is_asked(monkeypatch):
    asked = reports(monkeypatch, {"stuck": True})
    for record in (step(4.0), StepRecord(1, {}, step().trainer)):
        stuck_scale.stop_when_stuck(record)
        record.raise_if_stopped()
    assert asked == []


def test_at_the_limit_the_live_scaler_decides(monkeypatch):
    asked = reports(monkeypatch, {"stuck": False}, {"stuck": False})
    record = step()
    stuck_scale.stop_when_stuck(record)
    record.raise_if_stopped()
    assert asked == [300.0] and not record.checkpoint_wanted


@pytest.mark.parametrize(
    ("role", "kind", "scale", "tries"),
    (
        ("actor", "gradient", {}, "Try: a lower verl_fp16.loss_scale.min than 1, a lower learning rate, or"),
        ("critic", "gradient", {}, "Try: a lower verl_fp16.critic_loss_scale.min than 1"),
        ("actor", "gradient", {"mode": "static", "init": 64.0}, "verl_fp16.loss_scale.mode=dynamic, or a lower"),
        ("actor", "forward", {}, "the model does not fit float16 here: +precision=bf16"),
        ("actor", "norm", {}, "a lower learning rate"),
    ),
)
def test_a_stuck_scaler_ends_the_run_with_a_checkpoint_and_advice(monkeypatch, role, kind, scale, tries):
    reports(monkeypatch, {"stuck": True, "last_skip": {**SKIP, "kind": kind}}, role=role)
    record = step(role=role, **scale)
    stuck_scale.stop_when_stuck(record)
    assert record.checkpoint_wanted
    with pytest.raises(TrainingStopped) as stopped:
        record.raise_if_stopped()
    for said in (f"5 updates of the {role} in a row", "The newest: LINE.", "last good weights", tries):
        assert said in str(stopped.value)


def test_another_role_that_is_stuck_is_left_to_its_own_count(monkeypatch):
    both = {"actor": False, "critic": True}
    said = {"scale": 1.0, "last_skip": SKIP, "last_skip_line": "LINE"}
    monkeypatch.setattr(
        stuck_scale, "_reports", lambda *_: ([(role, {**said, "stuck": stuck}) for role, stuck in both.items()], [])
    )
    record = step(role="actor")
    stuck_scale.stop_when_stuck(record)
    record.raise_if_stopped()


def test_workers_that_do_not_answer_are_no_reason_to_go_on(monkeypatch):
    reports(monkeypatch)
    record = step(7.0)
    stuck_scale.stop_when_stuck(record)
    assert record.checkpoint_wanted
    with pytest.raises(TrainingStopped, match="7 updates of the actor .* do not say why: training worker 0: no answer"):
        record.raise_if_stopped()
