"""Hooks on verl's trainers: the read-back before the first validation or rollout, and the seam of the training step.

They act in a trainer whose configuration carries the flag, in the v1 trainer (every mode), the legacy one and the
one-step-off one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from verl_fp16 import plugin
from verl_fp16.hooks import mismatch
from verl_fp16.hooks.driver import is_flag_given, read_settings
from verl_fp16.hooks.gap_watch import watch_gap
from verl_fp16.hooks.stuck_scale import stop_when_stuck
from verl_fp16.telling import tell
from verl_fp16.training_step import StepRecord, forget, notify_observers, observe
from verl_fp16.weight_sync import audited_sync

# In the metrics of every training step, in all of verl's trainers, and not in those of the initial validation.
STEP_KEY = "training/global_step"

_OBSERVERS = (audited_sync.add_sync_metrics, watch_gap, stop_when_stuck)

# The trainer whose fit() is running in this process.
_trainer: Any = None
_warned = False


def fit_what_was_declared(original: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(original):

        async def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _fitting(self):
                return await original(self, *args, **kwargs)
    else:

        def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _fitting(self):
                return original(self, *args, **kwargs)

    return fit


@contextmanager
def _fitting(trainer: Any) -> Iterator[None]:
    global _trainer
    if not is_flag_given(getattr(trainer, "config", None)):
        yield
        return
    check_what_runs(trainer)
    audited_sync.read_back_done = True
    audited_sync.raise_deferred()
    _trainer = trainer
    mismatch.watched = True
    for observer in _OBSERVERS:
        observe(observer)
    try:
        yield
    finally:
        _trainer, audited_sync.read_back_done = None, False
        mismatch.watched = False
        mismatch.take_seen()
        for observer in _OBSERVERS:
            forget(observer)


def check_what_runs(trainer: Any) -> None:
    """Ask every process of the run what it runs; print it, write it beside the checkpoints, compare it.

    Raises:
        ReadBackError: something differs from the declaration, or a process did not report.
    """
    from verl_fp16.readback import table
    from verl_fp16.readback.compare import differences, raise_if_any
    from verl_fp16.readback.gather import gather

    settings = read_settings(trainer.config)
    answers = trainer._verl_fp16_read_back = gather(trainer, settings.read_back_timeout_s)
    found = differences(settings, answers)
    table.show(answers)
    folder = trainer.config.trainer.get("default_local_dir")
    try:
        file = str(table.write(folder, settings, answers, found)) if folder and "://" not in folder else ""
    except OSError as error:  # the verdict counts, not the file
        tell(f"the read-back could not be written under {folder}: {error}")
        file = ""
    raise_if_any(settings, found, file or "in the log above")


def running_trainer() -> Any:
    """The trainer with the flag whose ``fit`` is running in this process, or None."""
    return _trainer


def log_training_step(original: Callable[..., None]) -> Callable[..., None]:
    def log(self: Any, data: Any, step: int, *args: Any, **kwargs: Any) -> None:
        if not _is_fitting() or STEP_KEY not in data:
            return original(self, data, step, *args, **kwargs)
        record = StepRecord(step, data, _trainer)
        notify_observers(record)
        try:
            original(self, data, step, *args, **kwargs)
            if record.checkpoint_wanted and getattr(_trainer, "_verl_fp16_saved_step", None) != step:
                _trainer._save_checkpoint()
        except Exception as error:  # verl's loggers and its checkpoint raise anything; a stop stands all the same
            record.raise_if_stopped(besides=error)
            raise
        record.raise_if_stopped()

    return log


def _is_fitting() -> bool:
    global _warned
    if _trainer is None and plugin.flag_given and not _warned:
        _warned = True
        tell(
            "the precision flag is set, but this trainer is not one that verl_fp16 knows: what its workers "
            "run was not read back, and nothing of verl_fp16 watches its steps. Use verl.trainer.main_ppo"
        )
    return _trainer is not None


def remember_saved_step(original: Callable[..., None]) -> Callable[..., None]:
    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self is _trainer:
            self._verl_fp16_saved_step = self.global_steps

    return _save_checkpoint
