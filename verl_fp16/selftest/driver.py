"""Runs the stages, each in a process of its own: one that crashes or hangs is a row, and the others go on."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from verl_fp16.selftest import engine_rows, first_rows, gap_rows, plan, run_rows
from verl_fp16.selftest.plan import DEVICE, DOCTOR, ENGINE, GAP, MODEL, RUN, THROUGHPUT, Stage
from verl_fp16.selftest.room import Room, room
from verl_fp16.selftest.rows import FAIL, SKIP, Facts, Row
from verl_fp16.supervise import RunResult, run_supervised

STAGE = "verl_fp16.selftest.stage"
"""The module that a stage's process runs."""
_THEIRS = 3
"""A user's model may take so many times as long as the small one."""
# A stage ends what it started when it is interrupted itself, which takes a while.
_END_S = 40.0


@dataclass(frozen=True)
class Asked:
    """What is tested.

    Args:
        output: folder for logs and facts, absolute.
        device: gpu or cpu.
        gpus: GPUs; on a CPU, processes that train.
        model: the user's, absolute; None for the small one.
        prompts: the user's, absolute; None for the sums.
        only: the stages asked for; all where it is empty.
        environment: what every stage has beside this process's environment.
        gpu_names: of the GPUs that torch sees.
        gpu_bytes: memory of the smallest of them; None on a CPU.
        unseen_gpu: why there is a GPU that is not tested; "" where there is none.
        hidden_by: the variable that hides all GPUs; "" where none does.
    """

    output: Path
    device: str
    gpus: int
    model: Path | None
    prompts: Path | None
    only: tuple[str, ...]
    environment: Mapping[str, str]
    gpu_names: tuple[str, ...] = ()
    gpu_bytes: int | None = None
    unseen_gpu: str = ""
    hidden_by: str = ""

    @property
    def spec(self) -> dict[str, Any]:
        """As the stages take it."""
        paths = {name: None if (path := getattr(self, name)) is None else str(path) for name in ("model", "prompts")}
        return {"output": str(self.output), "device": self.device, "gpus": self.gpus, **paths}


Tell = Callable[[int, int, str, str, float], object]
"""Is told, about twice a second: the stage's number, of how many, its name, what is under way, seconds left."""


def run(asked: Asked, tell: Tell) -> tuple[list[Row], dict[str, Facts]]:
    """The rows, and the facts of every stage that gave some.

    Raises:
        OSError: the output folder cannot be written.
        KeyboardInterrupt: everything that was started has been ended.
    """
    planned, facts = plan.stages(asked.only), {}
    rows = [first_rows.device_row(asked.device, asked.gpu_names, asked.gpus, asked.unseen_gpu, asked.hidden_by)]
    expected = took = 0.0
    asked.output.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(planned, 1):
        if why := _in_the_way(stage, rows) or _no_room(stage, asked, facts):
            rows.append(Row(stage.name, SKIP, why))
            continue
        later, spec = sum(one.seconds[asked.device] for one in planned[number:]), _spec(stage, asked, facts)
        shown = _Shown(
            Path(spec["progress"]),
            stage.seconds[asked.device],
            later,
            took / expected if expected else 1.0,
            partial(tell, number, len(planned), stage.name),
        )
        result, found = run_stage(stage, spec, asked, shown)
        expected, took = expected + stage.seconds[asked.device], took + result.seconds
        if found is not None:
            facts[stage.name] = found
        rows += _judged(stage, asked.device, found, result)
    if _wants(THROUGHPUT, asked.only):
        rows += _throughput(facts.get(GAP), rows)
    return ([row for row in rows if _wanted(row, asked.only)], facts)


def _wants(name: str, only: Sequence[str]) -> bool:
    return not only or name in only


def _wanted(row: Row, only: Sequence[str]) -> bool:
    """Whether it is asked for, or says why something asked for is not there."""
    name = row.name.split()[0].rstrip(":")
    return _wants(DOCTOR if name == DEVICE else name, only) or row.status == FAIL


def _in_the_way(stage: Stage, rows: Sequence[Row]) -> str:
    """The row for which a stage cannot be run."""
    for row in rows:
        if row.status == FAIL and (row.name in (DOCTOR, MODEL) or (row.name == DEVICE and stage.name != DOCTOR)):
            return f"not run: {row.name} failed: {row.reason}"
    return ""


def _no_room(stage: Stage, asked: Asked, facts: Mapping[str, Facts]) -> str:
    """Why a user's model does not fit the GPUs in this stage; "" where it does, and on a CPU."""
    why = {RUN: _room(asked, facts).run, GAP: _room(asked, facts).gap}.get(stage.name, "")
    return f"not run: {asked.model} does not fit: {why}" if why else ""


def _room(asked: Asked, facts: Mapping[str, Facts]) -> Room:
    found = facts.get(MODEL, {})
    if asked.gpu_bytes is None or found.get("theirs") is None:
        return Room()
    return room(found["values"], found["heads"], asked.gpus, asked.gpu_bytes)


def _spec(stage: Stage, asked: Asked, facts: Mapping[str, Facts]) -> dict[str, Any]:
    spec = {**asked.spec, "progress": str(asked.output / f"{stage.name}.progress")}
    if stage.name == ENGINE:
        spec["model"] = str(asked.output / "model")
    if stage.name == RUN:
        spec |= {"longest": facts[MODEL]["longest"], "timeout_s": _timeout(stage, asked) - 2 * _END_S}
        spec["tensor_parallel"] = _room(asked, facts).tensor_parallel
    return spec


def _timeout(stage: Stage, asked: Asked) -> float:
    return stage.timeout_s * (_THEIRS if asked.model is not None else 1)


def run_stage(
    stage: Stage, spec: Mapping[str, Any], asked: Asked, on_tick: Callable[[], object]
) -> tuple[RunResult, Facts | None]:
    """How a stage's process ended, and the facts that it found; None where it found none."""
    folder = asked.output
    spec_file, facts_file = folder / f"{stage.name}.spec", folder / f"{stage.name}.json"
    for old in (facts_file, Path(spec["progress"])):
        old.unlink(missing_ok=True)
    spec_file.write_text(json.dumps(spec))
    try:
        result = run_supervised(
            [sys.executable, "-m", STAGE, stage.name, str(spec_file), str(facts_file)],
            log_path=folder / log_of(stage.name),
            env={**os.environ, **asked.environment},
            timeout_s=_timeout(stage, asked),
            on_tick=on_tick,
            critical=(),
            end_grace_s=_END_S,
        )
    finally:
        for used in (spec_file, Path(spec["progress"])):
            used.unlink(missing_ok=True)
    if result.ok:
        with contextlib.suppress(OSError, ValueError):
            return result, json.loads(facts_file.read_text(encoding="utf-8"))
    return result, None


def log_of(stage: str) -> str:
    """A stage's log, in the output folder."""
    return f"{stage}.log"


def _judged(stage: Stage, device: str, facts: Facts | None, result: RunResult) -> list[Row]:
    """The rows of one stage, with their seconds and logs."""
    log = log_of(stage.name)
    if facts is None:
        why = " | ".join(line.strip() for line in (result.cause or "it left no facts").splitlines())
        return [Row(stage.name, FAIL, why, round(result.seconds, 1), log)]
    judge: dict[str, Callable[[Facts], list[Row]]] = {
        DOCTOR: lambda found: first_rows.doctor_rows(found, device),
        MODEL: first_rows.model_rows,
        ENGINE: engine_rows.engine_rows,
        RUN: lambda found: run_rows.run_rows(found, plan.STEPS),
        GAP: gap_rows.gap_rows,
    }
    inner = {RUN: "run-verl.log", GAP: "gap/stages.log"}.get(stage.name, log)
    seconds = result.seconds
    return [
        replace(row, seconds=round(seconds if row.seconds is None else row.seconds, 1), log=row.log or inner)
        for row in judge[stage.name](facts)
    ]


def _throughput(facts: Facts | None, rows: Sequence[Row]) -> list[Row]:
    if facts is None:
        return [Row(THROUGHPUT, SKIP, "the stage gap gave no numbers")]
    seconds = next((row.seconds for row in rows if row.name.startswith(GAP)), None)
    return [replace(row, seconds=seconds, log="gap/stages.log") for row in gap_rows.throughput_rows(facts)]


class _Shown:
    """Tells how far a stage is.

    Args:
        file: where the stage says what is under way.
        expected_s: what it takes, about.
        later_s: what those after it take, about.
        slowness: by how much longer than expected this machine took so far.
        tell: is told what is under way, and the seconds left.
    """

    def __init__(
        self, file: Path, expected_s: float, later_s: float, slowness: float, tell: Callable[[str, float], object]
    ) -> None:
        self._file, self._tell, self._slowness = file, tell, slowness
        self._expected, self._later, self._began = expected_s, later_s, time.monotonic()

    def __call__(self) -> None:
        try:
            told = self._file.read_text(encoding="utf-8")
        except OSError:
            told = ""
        elapsed = time.monotonic() - self._began
        # What takes longer than was thought is taken to go on for a while, and what comes later to take longer too.
        slowness = max(self._slowness, 1.2 * elapsed / self._expected)
        self._tell(told, self._expected * slowness - elapsed + self._later * slowness)
