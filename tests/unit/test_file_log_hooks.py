"""verl's own file logger, in verl's own trainers: fresh runs, resumed ones, and processes without the flag."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy
import pytest
from omegaconf import OmegaConf

from verl_fp16 import file_log, training_step
from verl_fp16.file_log import mark
from verl_fp16.hooks import file_log as hooks
from verl_fp16.hooks import patcher
from verl_fp16.hooks import trainer as trainer_hooks
from verl_fp16.patching.patcher import CARRIED

STEP = "training/global_step"


def line(step: int, data: dict) -> bytes:
    return json.dumps({"step": step, "data": data}, separators=(",", ":")).encode() + b"\n"


def steps(*numbers: int) -> bytes:
    return b"".join(line(number, {STEP: number}) for number in numbers)


@pytest.fixture(autouse=True)
def nothing_is_asked(monkeypatch):
    """The hooks on verl are those that importing it puts in place."""
    monkeypatch.setattr(trainer_hooks, "check_what_runs", lambda trainer: None)
    monkeypatch.setattr(training_step, "_observers", {})


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(path))
    return path


@functools.cache
def verl_config() -> str:
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return OmegaConf.to_yaml(compose("ppo_trainer"))


# ---- verl's trainers: their own fit and _load_checkpoint, with everything else of theirs taken out


def trainer_class(name: str) -> type:
    if name == "v1":
        from verl.trainer.ppo.v1.trainer_base import PPOTrainer as trainer
    elif name == "legacy":
        from verl.trainer.ppo.ray_trainer import RayPPOTrainer as trainer
    else:
        from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer as trainer
    return trainer


def fit(name: str, checkpoints, flag: bool = True, before_validation=lambda: None, **settings) -> None:
    """Initialise and fit one of verl's trainers up to its initial validation, which it logs."""

    def validate(self):
        before_validation()
        return {"val/acc": numpy.float32(0.5)}

    noop = lambda self, *args, **kwargs: None  # noqa: E731
    unneeded = ("on_validate_begin", "on_validate_end", "_shutdown_dump_executor", "_fit_update_weights")
    known = trainer_class(name)
    in_small = type(name, (known,), {"_validate": validate, **dict.fromkeys(unneeded, noop)})
    in_small.__abstractmethods__ = frozenset()
    trainer = object.__new__(in_small)
    worker = SimpleNamespace(load_checkpoint=lambda *args, **kwargs: None, update_weights=lambda *args: None)
    trainer.actor_rollout_wg = trainer.checkpoint_manager = worker
    trainer.use_critic, trainer.trainer_mode, trainer.train_dataloader = False, "sync", [None]
    trainer._dump_executor = SimpleNamespace(_shutdown=False)
    trainer.config = OmegaConf.create(verl_config())
    trainer.config.trainer.update(
        {"logger": ["file"], "val_only": True, "default_local_dir": str(checkpoints), **settings}
    )
    if flag:
        trainer.config.verl_fp16 = {}
    if name == "v1":
        trainer._load_checkpoint()  # in its init; the others load in fit
        trainer.fit(None)
    else:
        done = trainer.fit()
        asyncio.run(done) if asyncio.iscoroutine(done) else None


def save_checkpoint(folder, step: int) -> None:
    (folder / f"global_step_{step}").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))


VALIDATION = {"val/acc": 0.5}
every_trainer = pytest.mark.parametrize("name", ("v1", "legacy", "one step off"))


@every_trainer
def test_a_run_that_resumes_goes_on_in_its_file(name, tmp_path, log, capsys):
    log.write_bytes(steps(1, 2, 3, 4, 5) + b'{"step":6,"da')
    save_checkpoint(tmp_path / "checkpoints", 3)
    fit(name, tmp_path / "checkpoints")
    assert log.read_bytes() == steps(1, 2, 3) + mark(3) + line(3, VALIDATION)
    said = capsys.readouterr()
    assert said.out.count(f"Creating file logger at {log}") == 1
    goes_on = f"verl_fp16: {log} goes on after step 3: 3 lines kept, 2 of later steps and 1 broken ones dropped\n"
    assert said.err.count(goes_on) == 1


@every_trainer
def test_a_run_that_resumes_from_a_named_checkpoint(name, tmp_path, log):
    log.write_bytes(steps(1, 2, 3, 4, 5))
    save_checkpoint(tmp_path / "checkpoints", 2)
    save_checkpoint(tmp_path / "checkpoints", 4)
    folder = str(tmp_path / "checkpoints" / "global_step_2")
    fit(name, tmp_path / "checkpoints", resume_mode="resume_path", resume_from_path=folder)
    assert log.read_bytes() == steps(1, 2) + mark(2) + line(2, VALIDATION)


@every_trainer
def test_a_fresh_run_starts_a_fresh_file(name, tmp_path, log, capsys):
    log.write_bytes(steps(0, 1, 2))
    fit(name, tmp_path / "none")
    assert log.read_bytes() == line(0, VALIDATION)
    assert "verl_fp16" not in capsys.readouterr().err


@every_trainer
def test_a_run_that_is_not_to_resume_starts_a_fresh_file(name, tmp_path, log):
    log.write_bytes(steps(0, 1, 2))
    save_checkpoint(tmp_path / "checkpoints", 2)
    fit(name, tmp_path / "checkpoints", resume_mode="disable")
    assert log.read_bytes() == line(0, VALIDATION)


@every_trainer
def test_without_the_flag_verl_truncates_where_it_opens(name, tmp_path, log):
    log.write_bytes(steps(1, 2, 3, 4))
    save_checkpoint(tmp_path / "checkpoints", 3)
    seen = []
    fit(name, tmp_path / "checkpoints", flag=False, before_validation=lambda: seen.append(log.read_bytes()))
    assert seen == [b""]
    assert log.read_bytes() == line(3, VALIDATION)


@every_trainer
@pytest.mark.parametrize("resumes", (True, False))
def test_a_crash_before_the_first_log_leaves_all_as_it_was(name, resumes, tmp_path, log):
    before = steps(1, 2, 3, 4) + b'{"step"'
    log.write_bytes(before)
    if resumes:
        save_checkpoint(tmp_path / "checkpoints", 3)

    def crash():
        assert log.read_bytes() == before
        raise MemoryError

    with pytest.raises(MemoryError):
        fit(name, tmp_path / "checkpoints", before_validation=crash)
    assert log.read_bytes() == before


@every_trainer
def test_resuming_again_and_again(name, tmp_path, log):
    log.write_bytes(steps(1, 2, 3, 4))
    for step in (2, 3, 1):
        save_checkpoint(tmp_path / "checkpoints", step)
        fit(name, tmp_path / "checkpoints")
        log.write_bytes(log.read_bytes() + steps(step + 1))
    # Of the resumes at 2 and 3 nothing is left: they are of steps that the last one takes anew.
    assert log.read_bytes() == steps(1) + mark(1) + line(1, VALIDATION) + steps(2)


# ---- the logger alone, under a trainer that notes where it resumed


class Small:
    """A trainer with the flag whose loop is given."""

    def __init__(self, loop, resumed_step: int | None):
        self.config, self.loop = OmegaConf.create({"verl_fp16": {}}), loop
        if resumed_step is not None:
            self.found = resumed_step
            hooks.remember_resumed_step(lambda self: setattr(self, "global_steps", self.found))(self)

    def fit(self):
        trainer_hooks.fit_what_was_declared(lambda self: self.loop())(self)


def tracking():
    from verl.utils.tracking import Tracking

    return Tracking("project", "experiment", ["file"])


def run(resumed_step: int | None, *logged: tuple[int, dict]) -> None:
    def loop():
        logger = tracking()
        for step, data in logged:
            logger.log(data=data, step=step)
        logger.finish()

    Small(loop, resumed_step).fit()


def test_it_is_the_resume_that_counts_and_not_the_first_step_logged(log):
    """Whoever makes a logger of his own in a fresh run may begin at any step; a resumed run may skip validation."""
    log.write_bytes(steps(1, 2, 3))
    run(0, (3, {"x": 1.0}))
    assert log.read_bytes() == line(3, {"x": 1.0})
    log.write_bytes(steps(1, 2, 3))
    run(1, (2, {STEP: 2}))
    assert log.read_bytes() == steps(1) + mark(1) + steps(2)


def test_every_value_that_verl_can_write_is_written_as_by_verl(log):
    data = {"a": numpy.float32(0.1), "b": numpy.int64(3), "c": numpy.array([1.5, 2.0]), "d": float("nan"), "e": "x"}
    tracking().log(data, step=numpy.int64(1))
    by_verl = log.read_bytes()
    log.unlink()
    run(0, (numpy.int64(1), data))
    assert log.read_bytes() == by_verl
    log.write_bytes(by_verl)
    run(1, (2, data))
    assert log.read_bytes() == by_verl + mark(1) + by_verl.replace(b'"step":1', b'"step":2')


@pytest.mark.parametrize("resumed_step", (0, 3))
def test_without_a_file_before(log, resumed_step):
    run(resumed_step, (resumed_step + 1, {"x": 1}))
    assert log.read_bytes() == (mark(3) if resumed_step else b"") + line(resumed_step + 1, {"x": 1})


def test_the_file_is_where_verl_has_it(tmp_path, monkeypatch):
    monkeypatch.delenv("VERL_FILE_LOGGER_PATH", raising=False)
    monkeypatch.setenv("VERL_FILE_LOGGER_ROOT", str(tmp_path))
    run(1, (2, {"x": 1}))
    assert (tmp_path / "project" / "experiment.jsonl").read_bytes() == mark(1) + line(2, {"x": 1})


@pytest.mark.parametrize("resumed_step", (0, 1))
def test_the_process_may_go_elsewhere(tmp_path, monkeypatch, resumed_step):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "run.jsonl")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run.jsonl").write_bytes(steps(1, 2))

    def loop():
        logger = tracking()
        os.chdir(tmp_path / "elsewhere")
        logger.log({STEP: 2}, 2)
        logger.log({STEP: 3}, 3)

    Small(loop, resumed_step).fit()
    assert (tmp_path / "run.jsonl").read_bytes() == (steps(1) + mark(1) if resumed_step else b"") + steps(2, 3)
    assert [*(tmp_path / "elsewhere").iterdir()] == []


def test_what_cannot_be_opened_is_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "no folder" / "run.jsonl"))
    with pytest.raises(FileNotFoundError):
        Small(tracking, 1).fit()


@pytest.mark.parametrize("resumed_step", (0, 3))
def test_what_is_no_file_is_written_to_and_nothing_else(monkeypatch, resumed_step):
    main, terminal = os.openpty()
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", os.ttyname(terminal))
    try:
        run(resumed_step, (4, {STEP: 4}))
        assert os.read(main, 1000).replace(b"\r\n", b"\n") == steps(4)
    finally:
        os.close(main)
        os.close(terminal)


def test_a_folder_that_takes_no_new_file_costs_no_history(log, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("read-only folder")

    monkeypatch.setattr(file_log.tempfile, "NamedTemporaryFile", fail)
    log.write_bytes(steps(1, 2)[:-1])
    run(1, (2, {STEP: 2}))
    assert log.read_bytes() == steps(1, 2) + mark(1) + steps(2)
    assert f"{log} goes on after step 1, nothing of it was dropped: read-only folder" in capsys.readouterr().err


def test_a_trainer_that_loads_in_a_way_of_its_own_is_said(log, capsys):
    log.write_bytes(steps(1, 2))
    run(None, (2, {STEP: 2}))
    assert log.read_bytes() == steps(2)
    assert "Small loads checkpoints in a way that verl_fp16 does not know" in capsys.readouterr().err


def test_a_logger_of_anybody_else_is_verls(log):
    """After a run with the flag, in the same process, and as verl's SFT trainer makes one."""
    run(3, (4, {STEP: 4}))
    logger = tracking()
    assert log.read_bytes() == b""
    logger.log({STEP: 1}, 1)
    logger.finish()
    assert log.read_bytes() == steps(1)


def test_the_hooks_are_those_of_the_records():
    import verl.trainer.ppo.ray_trainer
    import verl.trainer.ppo.v1.trainer_base  # noqa: F401

    names = ("trainer.file_log", "trainer.file_log_begin", "trainer.resumed_step", "trainer.legacy_resumed_step")
    assert {patcher.status()[name] for name in names} <= {"applied", f"not needed: {CARRIED}"}


def test_before_applied_and_undone(tmp_path):
    """In a process of its own: what verl's logger does to a file, plain, with the hooks in place, and after them."""
    code = r"""
        import sys
        from verl.utils.tracking import FileLogger

        path = sys.argv[1]
        plain = dict(vars(FileLogger))

        class Trainer:
            _verl_fp16_resumed_step = 2

        def resume():
            with open(path, "w") as file:
                file.write('{"step":1,"data":{}}\n{"step":3,"data":{}}\n')
            logger = FileLogger("project", "experiment")
            logger.log({}, 3)
            logger.finish()
            return open(path).read().count("\n"), dict(vars(FileLogger)) == plain

        found = [resume()]
        import verl_fp16.plugin  # puts the hooks in place
        from verl_fp16.hooks import patcher, trainer
        trainer._trainer = Trainer()
        found.append(resume())
        patcher.undo()
        found.append(resume())
        patcher.apply()
        found.append(resume())
        print(found)
    """
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_FILE_LOGGER_PATH": str(tmp_path / "log")}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "log")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[(1, True), (3, False), (1, True), (3, False)]"
