"""The seam of the training step: observers add metrics, have a checkpoint saved and stop, in any trainer of verl's."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from verl_fp16 import plugin, training_step
from verl_fp16.hooks import trainer as hooks
from verl_fp16.training_step import TrainingStopped, forget, observe

STEP = {"training/global_step": 1, "actor/loss": 0.5}


class Tracking:
    def __init__(self):
        self.logged = []

    def log(self, data, step, backend=None):
        self.logged.append((step, dict(data)))


class Trainer:
    """verl's loop in small: the initial validation, then steps; saves by itself where ``save_freq`` says so."""

    def __init__(self, flag: bool = True, steps: int = 3, save_freq: int = 0):
        self.config = OmegaConf.create({"verl_fp16": {}} if flag else {})
        self.steps, self.save_freq, self.saved, self.tracking = steps, save_freq, [], Tracking()
        self.ended = False

    def _save_checkpoint(self):
        self.saved.append(self.global_steps)

    def fit(self):
        self.global_steps = 0
        self.tracking.log(data={"val/acc": 0.1}, step=0)
        for number in range(1, self.steps + 1):
            self.global_steps = number
            if self.save_freq and self.global_steps % self.save_freq == 0:
                self._save_checkpoint()
            self.tracking.log(data={"training/global_step": self.global_steps, "val/acc": 0.2}, step=self.global_steps)
        self.ended = True


@pytest.fixture(autouse=True)
def hooked(monkeypatch):
    monkeypatch.setattr(Tracking, "log", hooks.log_training_step(Tracking.log))
    monkeypatch.setattr(Trainer, "fit", hooks.fit_what_was_declared(Trainer.fit))
    monkeypatch.setattr(Trainer, "_save_checkpoint", hooks.remember_saved_step(Trainer._save_checkpoint))
    monkeypatch.setattr(hooks, "check_what_runs", lambda trainer: None)
    monkeypatch.setattr(hooks, "_warned", False)
    monkeypatch.setattr(training_step, "_observers", {})


def test_an_observer_sees_every_training_step_and_its_metrics_are_logged():
    seen = []

    @observe
    def watch(step):
        seen.append((step.number, step.trainer))
        step.metrics["mine"] = step.number * 10

    trainer = Trainer()
    trainer.fit()
    assert seen == [(number, trainer) for number in (1, 2, 3)], "the initial validation is no training step"
    assert [(step, data.get("mine")) for step, data in trainer.tracking.logged] == [
        (0, None),
        (1, 10),
        (2, 20),
        (3, 30),
    ]


def test_a_checkpoint_is_saved_once_a_step_after_the_log():
    @observe
    def first(step):
        if step.number == 2:
            step.save_checkpoint()
            step.save_checkpoint()
            assert step.trainer.saved == [], "metrics first"

    @observe
    def second(step):
        if step.number == 2:
            step.save_checkpoint()

    trainer = Trainer()
    trainer.fit()
    assert trainer.saved == [2]


def test_a_step_that_verl_saved_itself_is_not_saved_again():
    observe(lambda step: step.save_checkpoint())
    trainer = Trainer(save_freq=2)
    trainer.fit()
    assert trainer.saved == [1, 2, 3]


def test_stop_comes_after_the_log_and_the_checkpoint_with_the_observers_name():
    @observe
    def alarm(step):
        if step.number == 2:
            step.metrics["alarm"] = 1.0
            step.save_checkpoint()
            step.stop("the gap doubled")

    trainer = Trainer()
    with pytest.raises(TrainingStopped, match=r"step 2 by .*alarm: the gap doubled"):
        trainer.fit()
    assert trainer.tracking.logged[-1] == (2, {"training/global_step": 2, "val/acc": 0.2, "alarm": 1.0})
    assert trainer.saved == [2]
    assert not trainer.ended


def test_an_observer_that_raises_stops_the_run_by_name_and_the_others_are_called():
    @observe
    def broken(step):
        raise KeyError("actor/nothing")

    @observe
    def fine(step):
        step.metrics["fine"] = 1.0

    trainer = Trainer()
    with pytest.raises(TrainingStopped, match=r"broken: KeyError: 'actor/nothing'") as caught:
        trainer.fit()
    assert isinstance(caught.value.__cause__, KeyError)
    assert trainer.tracking.logged[-1][1]["fine"] == 1.0


def test_reasons_of_several_observers_are_all_named():
    observe(one := lambda step: step.stop("too high"))

    @observe
    def other(step):
        step.stop("too low")

    with pytest.raises(TrainingStopped, match=r"too high; .*other: too low"):
        Trainer().fit()
    forget(one)
    with pytest.raises(TrainingStopped) as caught:
        Trainer().fit()
    assert "too high" not in str(caught.value)


def test_an_observer_from_the_same_place_replaces_the_former():
    def make(value):
        def watch(step):
            step.metrics["mine"] = value

        return watch

    observe(make(1))
    observe(make(2))
    trainer = Trainer(steps=1)
    trainer.fit()
    assert trainer.tracking.logged[-1][1]["mine"] == 2
    assert len(training_step._observers) == 1


def test_without_the_flag_no_observer_is_called_and_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(hooks, "check_what_runs", lambda trainer: pytest.fail("asked"))
    observe(lambda step: pytest.fail("called"))
    trainer = Trainer(flag=False)
    trainer.fit()
    assert len(trainer.tracking.logged) == 4


def test_what_differs_stops_before_the_loop_begins(monkeypatch):
    def refuse(trainer):
        raise RuntimeError("differs")

    monkeypatch.setattr(hooks, "check_what_runs", refuse)
    trainer = Trainer()
    with pytest.raises(RuntimeError, match="differs"):
        trainer.fit()
    assert trainer.tracking.logged == []


def test_after_fit_the_trainer_is_not_known_any_more():
    observe(lambda step: pytest.fail("called"))
    trainer = Trainer(steps=0)
    trainer.fit()
    trainer.tracking.log(data=dict(STEP), step=1)
    assert trainer.tracking.logged[-1] == (1, STEP)


def test_a_trainer_with_an_asynchronous_loop_is_covered():
    import asyncio

    called = []

    class Asynchronous(Trainer):
        async def fit(self):
            await asyncio.sleep(0)
            self.tracking.log(data=dict(STEP), step=1)
            return "done"

    Asynchronous.fit = hooks.fit_what_was_declared(Asynchronous.fit)
    observe(lambda step: called.append(step.number))
    assert asyncio.run(Asynchronous().fit()) == "done"
    assert called == [1]


def test_a_trainer_that_is_not_known_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(plugin, "flag_given", False)
    monkeypatch.setattr(hooks, "_warned", False)
    tracking = Tracking()
    tracking.log(data=dict(STEP), step=1)
    assert capsys.readouterr().err == "", "without the flag nothing is said"
    monkeypatch.setattr(plugin, "flag_given", True)
    tracking.log(data=dict(STEP), step=1)
    tracking.log(data=dict(STEP), step=2)
    assert capsys.readouterr().err.count("was not read back") == 1
    assert len(tracking.logged) == 3


def test_a_stop_stands_though_its_checkpoint_fails():
    trainer = Trainer()

    def fail():
        raise OSError("disk full")

    trainer._save_checkpoint = fail

    def watch(step):
        step.save_checkpoint()
        step.stop("the gap is too large")

    observe(watch)
    with pytest.raises(TrainingStopped, match=r"the gap is too large \(and then OSError: disk full\)"):
        trainer.fit()
