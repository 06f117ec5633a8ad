"""Hooks on verl's file logger: a run that resumes goes on in the file, a fresh one starts it anew.

The legacy trainer and the one-step-off one make their loggers before they look for a checkpoint, so where a file is
opened it is not known yet whether the run resumes. It is when the first metrics are logged: every trainer has loaded
its checkpoint by then. A run that ends before that leaves the file as it was. A logger that is made while no trainer
with the flag is running, as verl's SFT trainer and its fully asynchronous one do, is verl's to the last bit.

Whether and from where a run resumed is what the trainer's own ``_load_checkpoint`` left in ``global_steps``, noted as
it returns. It cannot be read later: the step of the first log is that of the checkpoint or the next one, as the run
validates first or not, and whoever has a logger of his own may begin at any step. Nor does the configuration say it:
``resume_mode=auto`` is the default of fresh runs too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

from verl_fp16.file_log import continue_log, mark
from verl_fp16.hooks.driver import is_flag_given
from verl_fp16.hooks.trainer import running_trainer
from verl_fp16.telling import tell


def remember_resumed_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if is_flag_given(getattr(self, "config", None)):
            self._verl_fp16_resumed_step = self.global_steps  # 0 where nothing was loaded
        return result

    return _load_checkpoint


def open_without_truncating(original: Callable[..., None]) -> Callable[..., None]:
    """verl's body, with another mode of opening: by a wrap alone the file would be empty before it can be kept."""

    def __init__(self: Any, project_name: str, experiment_name: str) -> None:
        trainer = running_trainer()
        if trainer is None:
            return original(self, project_name, experiment_name)
        self.project_name = project_name
        self.experiment_name = experiment_name

        self.filepath = os.getenv("VERL_FILE_LOGGER_PATH", None)
        if self.filepath is None:
            root_path = os.path.expanduser(os.getenv("VERL_FILE_LOGGER_ROOT", "."))
            directory = os.path.join(root_path, self.project_name)
            os.makedirs(directory, exist_ok=True)
            self.filepath = os.path.join(directory, f"{self.experiment_name}.jsonl")
        print(f"Creating file logger at {os.path.abspath(self.filepath)}")
        self.fp = open(self.filepath, "ab", buffering=0)
        # The path is resolved now: the process may be in another folder by the first log.
        self._verl_fp16_not_begun = trainer, os.path.realpath(self.filepath)

    return __init__


def begin_with_first_log(original: Callable[..., None]) -> Callable[..., None]:
    def log(self: Any, data: Any, step: int, *args: Any, **kwargs: Any) -> None:
        if (not_begun := vars(self).pop("_verl_fp16_not_begun", None)) is not None:
            _begin(self, *not_begun)
        return original(self, data, step, *args, **kwargs)

    return log


def _begin(logger: Any, trainer: Any, path: str) -> None:
    """Bring the file of ``logger``, open for appending, into the state in which this run's first line belongs."""
    if not stat.S_ISREG(os.fstat(logger.fp.fileno()).st_mode):  # a pipe or a terminal: there is nothing to keep
        return
    resumed_step = getattr(trainer, "_verl_fp16_resumed_step", None)
    if resumed_step is None:
        tell(
            f"{type(trainer).__name__} loads checkpoints in a way that verl_fp16 does not know: {path} starts anew, as "
            "verl has it, though the run may have resumed"
        )
    if not resumed_step:
        logger.fp.truncate(0)
        return
    try:
        lines = continue_log(path, resumed_step)
    except OSError as error:  # as in a folder that takes no new file: better too many lines than none
        tell(f"{path} goes on after step {resumed_step}, nothing of it was dropped: {error}")
        logger.fp.write(b"\n" + mark(resumed_step))  # its last line may lack the end
        return
    logger.fp.close()
    logger.fp = open(path, "ab", buffering=0)
    tell(
        f"{path} goes on after step {resumed_step}: {lines.kept} lines kept, {lines.later} of later steps and "
        f"{lines.broken} broken ones dropped"
    )
