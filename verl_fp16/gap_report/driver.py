"""From what is asked to numbers: prompts, samples, scores, each stage in its own process, nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_fp16.gap_report import folder, prompts
from verl_fp16.gap_report.errors import GapError
from verl_fp16.gap_report.folder import WorkFolder
from verl_fp16.gap_report.sides import Measurement, Rollout
from verl_fp16.leftovers import shared_memory_given_back
from verl_fp16.run_log import telling_lines
from verl_fp16.whole_files import write_whole

Progress = Callable[[str, int, int], None]
"""Is told what is under way, how many sequences of it are done, and of how many."""

STAGE = "verl_fp16.gap_report.stage"
"""The module that a stage's process runs."""
FOUND = "found.json"
SPEED = "speed.json"
LOG = "stages.log"
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Settings:
    """What decides the numbers, beside model, prompts and measurements.

    Args:
        samples: answers of a prompt.
        max_tokens: of an answer.
        lengths: (least, most) tokens of an answer, drawn evenly, past its end; None leaves the end to the model.
        seed: of all of it.
        rollout: further arguments of :class:`verl_fp16.sampling.Sampler`.
        training: further arguments of :class:`verl_fp16.gap_report.training_side.TrainingSide`.
        timed_s: seconds that sampling and the training side take at least, to be timed, see :func:`speed`; not timed
            without it. What is done for it alone changes no token and no score.
    """

    samples: int
    max_tokens: int
    lengths: tuple[int, int] | None
    seed: int
    rollout: dict[str, Any]
    training: dict[str, Any]
    timed_s: float | None = None


def run(model: Path, work: WorkFolder, measurements: Sequence[Measurement], settings: Settings, tell: Progress) -> None:
    """Make every part that is not there yet.

    Raises:
        GapError: a stage failed, or a file in ``work`` is damaged; what was done so far is kept.
    """
    sample(model, work, [measurement.tokens for measurement in measurements], settings, tell)
    common, engine = _common(model, work, settings)
    for measurement in measurements:
        names = [part.name for part in folder.parts(work.tokens(measurement.tokens.slug))]
        spec = {**common, "tokens": measurement.tokens.slug}
        for side in ("rollout", "training") if measurement.scored else ("training",):
            what = getattr(measurement, side)
            target = work.scores(side, what.slug, measurement.tokens.slug)
            if all((target / name).exists() for name in names):
                continue
            asked = {**spec, "stage": f"score_{side}", "side": asdict(what), "slug": what.slug}
            if side == "rollout":  # vLLM samples one token beside
                asked["engine"] = {**engine, "max_model_len": _longest(work, measurement) + 1}
            else:
                asked |= {"settings": settings.training, "timed_s": settings.timed_s}
            _stage(work, target, asked, f"scoring, {side} {what.slug}", tell)


def sample(model: Path, work: WorkFolder, rollouts: Sequence[Rollout], settings: Settings, tell: Progress) -> None:
    """Make every answer of ``rollouts`` that is not there yet.

    Raises:
        GapError: as :func:`run`.
    """
    common, engine = _common(model, work, settings)
    for rollout in dict.fromkeys(rollouts):
        target = work.tokens(rollout.slug)
        if sum(1 for _ in folder.samples(target)) < common["total"]:
            spec = {**common, "stage": "sample", "side": asdict(rollout), "slug": rollout.slug, "seed": settings.seed}
            spec |= {"samples": settings.samples, "max_tokens": settings.max_tokens, "lengths": settings.lengths}
            spec |= {"timed_s": settings.timed_s, "engine": engine}
            _stage(work, target, spec, f"sampling, {rollout.slug}", tell)


def speed(target: Path) -> dict[str, float] | None:
    """What a stage's folder says of its speed, see :class:`verl_fp16.gap_report.timing.Passes`; None where nothing."""
    file = target / SPEED
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _common(model: Path, work: WorkFolder, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every stage is told, and the settings of every rollout."""
    number, longest = prompts.count_and_longest(work.prompts)
    # For the model's own length vLLM may have no room.
    engine = {**settings.rollout, "max_model_len": longest + settings.max_tokens}
    return {"model": str(model), "work": str(work.path), "total": number * settings.samples}, engine


def _longest(work: WorkFolder, measurement: Measurement) -> int:
    import pyarrow.compute as pc

    longest = 0
    for file in folder.parts(work.tokens(measurement.tokens.slug)):
        table = folder.table(file, ["prompt", "answer"])
        lengths = pc.add(pc.list_value_length(table["prompt"]), pc.list_value_length(table["answer"]))
        longest = max(longest, pc.max(lengths).as_py())
    return longest


def _stage(work: WorkFolder, target: Path, spec: dict[str, Any], name: str, tell: Progress) -> None:
    """Run one to its end; its files are whole or not there however it ends."""
    target.mkdir(parents=True, exist_ok=True)
    read, write = os.pipe()
    with shared_memory_given_back(), tempfile.TemporaryDirectory() as temporary, open(work.path / LOG, "ab") as log:
        file = Path(temporary) / "spec.json"
        file.write_text(json.dumps(spec))
        tell(name, 0, spec["total"])
        before = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", STAGE, str(file), str(write)],
            pass_fds=(write,),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=_environment(),
        )
        os.close(write)
        failed: dict[str, Any] | None = None
        try:
            for said in _lines(read):
                if "found" in said:
                    write_whole(target / FOUND, json.dumps(said["found"]).encode())
                if said.get("speed"):
                    write_whole(target / SPEED, json.dumps(said["speed"]).encode())
                if "done" in said:
                    tell(name, said["done"], said["of"])
                failed = said if "failed" in said else failed
            code = process.wait()
        finally:
            _end(process)
    if code or failed:
        failed = failed or {
            "failed": f"{name} ended with code {code}; its output is in {work.path / LOG}",
            "look": True,
        }
        raise GapError(_reason(failed["failed"], failed.get("look"), work.path / LOG, before))


def _reason(told: str, look: bool | None, log: Path, since: int) -> str:
    """``told``, and errors from the log behind byte ``since``: what vLLM's engine, a process of its own, died of."""
    errors = telling_lines(log, 2, since=since, errors_only=True) if look else []
    return " | ".join([told, *(line for line in errors if line not in told)])


def _lines(read: int) -> Iterator[dict[str, Any]]:
    with os.fdopen(read, "rb") as lines:
        for line in lines:
            yield json.loads(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its whole process group: vLLM's engine is a child of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            continue


def _environment() -> dict[str, str]:
    ours = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**ours, **os.environ, "PYTHONUNBUFFERED": "1"}
