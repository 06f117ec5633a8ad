"""The watch on the gap in the trainer's process, an observer of the training step: names what is logged, raises alarms,
writes evidence."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from verl_fp16.hooks import mismatch
from verl_fp16.hooks.bypass import FIRST_MINI_BATCH
from verl_fp16.hooks.driver import read_settings
from verl_fp16.mismatch.alarms import Alarm, Alarms
from verl_fp16.mismatch.measured import MeasuredGap
from verl_fp16.mismatch.repetition import rows_with_runs
from verl_fp16.mismatch_settings import MismatchSettings
from verl_fp16.readback.compare import dtypes_in_force
from verl_fp16.telling import tell
from verl_fp16.training_step import StepRecord

FOLDER = Path("verl_fp16") / "mismatch"


def watch_gap(step: StepRecord) -> None:
    watch = getattr(step.trainer, "_verl_fp16_gap_watch", None)
    if watch is None:
        watch = step.trainer._verl_fp16_gap_watch = GapWatch(step.trainer)
    watch.look_at(step)


class GapWatch:
    """Of one trainer; lives as long as its run."""

    def __init__(self, trainer: Any) -> None:
        settings = read_settings(trainer.config)
        self._settings: MismatchSettings = settings.mismatch
        self._timeout_s = settings.read_back_timeout_s
        self._alarms = Alarms(self._settings)
        self._dtypes = dtypes_in_force(getattr(trainer, "_verl_fp16_read_back", ()))
        self._folder = _folder_of(trainer)
        self._told: set[str] = set()

    def look_at(self, step: StepRecord) -> None:
        """Add to the metrics of ``step``, tell its alarms and do what the settings say, write its evidence."""
        began, seen = time.perf_counter(), mismatch.take_seen()
        _drop_role(step.metrics)
        if seen.statistics is not None:  # verl averages over the updates of a step, where it has several
            step.metrics.update(mismatch.named(seen.statistics))
        self._look_for_runs(step, seen.responses)
        if not any(name.startswith((mismatch.PREFIX, FIRST_MINI_BATCH)) for name in step.metrics):
            return
        for side, dtypes in self._dtypes.items():
            step.metrics.update({f"{mismatch.PREFIX}{side}_dtype/{dtype}": 1.0 for dtype in dtypes})
        alarms = self._alarms.judge(step.number, step.metrics)
        step.metrics[f"{mismatch.PREFIX}alarms"] = float(self._alarms.holding)
        for alarm in alarms:
            tell(alarm.line(step.number))
        interval = self._settings.evidence_interval
        if alarms or interval and step.number % interval == 0:
            try:
                self._write_evidence(step, seen.gap, alarms)
            except Exception as error:  # noqa: BLE001  whatever a tokenizer or a full disk raises: training goes on
                self._tell_once(f"no evidence of the mismatch under {self._folder}: {type(error).__name__}: {error}")
        step.metrics[f"{mismatch.PREFIX}seconds"] = seen.seconds + time.perf_counter() - began
        if alarms and self._settings.on_alarm in ("checkpoint", "stop"):
            step.save_checkpoint()
        if alarms and self._settings.on_alarm == "stop":
            step.stop("; ".join(alarm.line(step.number) for alarm in alarms))

    def _look_for_runs(self, step: StepRecord, responses: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        length = self._settings.alarm_run_tokens
        if responses is not None and length is not None and len(responses[0]):
            stuck = rows_with_runs(*responses, length)
            step.metrics[f"{mismatch.PREFIX}repeating_rows_share"] = stuck / len(responses[0])

    def _write_evidence(self, step: StepRecord, measured: MeasuredGap | None, alarms: Sequence[Alarm]) -> None:
        from verl_fp16.mismatch import evidence_files

        bounds = self._settings.evidence_tokens, self._settings.evidence_sequences
        if self._folder is None:
            return
        if measured is not None:
            found = [measured.evidence(*bounds)]
        elif any(name.startswith(FIRST_MINI_BATCH) for name in step.metrics):
            found = self._of_ranks(step.trainer, bounds)
        else:
            found = []
        if not found:
            return
        (first, curves), *others = found
        facts = {
            "dtypes": self._dtypes,
            "alarms": [alarm.line(step.number) for alarm in alarms],
            "scalars": {name: value for name, value in step.metrics.items() if name.startswith("mismatch")},
        }
        written = evidence_files.write(
            self._folder,
            step.number,
            first.merge([evidence for evidence, _ in others]),
            decode=step.trainer.tokenizer.decode,
            curves=curves,
            facts=facts,
            keep=self._settings.evidence_keep,
            alarm=bool(alarms),
        )
        if alarms:
            tell(f"the tokens of step {step.number} with the largest gap: verl-fp16 tokens {written}")

    def _of_ranks(self, trainer: Any, bounds: tuple[int, int]) -> list[tuple[Any, Any]]:
        """Each actor rank's evidence of the first mini-batch, with the curves of all."""
        from verl_fp16.mismatch.rank_evidence import first_mini_batch_evidence
        from verl_fp16.readback.gather import ask, training_questions

        def ask_rank(actor: Any) -> Any:
            return actor.__ray_call__.remote(first_mini_batch_evidence, *bounds)

        questions = [replace(question, ask=ask_rank) for question in training_questions(trainer)]
        answers = ask(questions, self._timeout_s)
        for answer in answers:
            if answer.failure:
                self._tell_once(f"no evidence of the mismatch from {answer.name()}: {answer.failure}")
        return [answer.report for answer in answers if answer.report]

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            tell(line)


def _drop_role(metrics: Any) -> None:
    """verl puts the role before what an engine logs; this is of both sides."""
    ours = tuple(f"actor/{prefix}" for prefix in (FIRST_MINI_BATCH, mismatch.PREFIX))
    for name in [name for name in metrics if name.startswith(ours)]:
        metrics[name.removeprefix("actor/")] = metrics.pop(name)


def _folder_of(trainer: Any) -> Path | None:
    folder = OmegaConf.select(trainer.config, "trainer.default_local_dir")
    return Path(folder) / FOLDER if folder and "://" not in folder else None
