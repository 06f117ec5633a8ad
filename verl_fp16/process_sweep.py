"""The runs of a sweep, one after the other and each in a process of its own: what is started, and what came of it.

What Hydra's launcher ``verl_fp16_processes`` does. Knows no verl.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from verl_fp16.refusal import Refused

CANNOT_START = 126  # as a shell

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SET_HERE = ("hydra.mode", "hydra.run.dir", "hydra.job.id", "hydra.job.num")


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Args:
        told: the overrides in which it differs from the others, for messages.
        folder: Hydra's folder of it.
        command: program and arguments.
    """

    told: str
    folder: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        code: its exit code, 128 and the signal's number where a signal ended it.
        seconds: wall-clock time.
    """

    job: Job
    code: int
    seconds: float

    @property
    def ending(self) -> str:
        """In words."""
        if self.code <= 128:
            return f"exit code {self.code}"
        with contextlib.suppress(ValueError):
            return f"exit code {self.code} ({signal.Signals(self.code - 128).name})"
        return f"exit code {self.code}"


def this_program(executable: str, original: Sequence[str], arguments: Sequence[str]) -> tuple[str, ...]:
    """How this process was started, as a command, with those of Hydra's options that say where the configuration is.

    Args:
        executable: ``sys.executable``.
        original: ``sys.orig_argv``.
        arguments: ``sys.argv``, whose first is the program and whose others Hydra has read.

    Raises:
        Refused: the arguments are not those that the process was started with.
    """
    from hydra._internal.utils import get_args  # what reads them in hydra.main, abbreviations and all

    given = list(arguments[1:])
    program = list(original[1 : len(original) - len(given)])
    if list(original[len(original) - len(given) :]) != given or not program:
        raise Refused(
            "verl_fp16: hydra/launcher=verl_fp16_processes starts this program anew for each run, and the program has "
            "changed its arguments (sys.argv) since it was started. Leave them as they are, or start each run by itself"
        )
    options = get_args(given)
    kept = (
        ("--config-path", options.config_path),
        ("--config-dir", options.config_dir),
        ("--config-name", options.config_name),
    )
    return (executable, *program, *(f"{name}={value}" for name, value in kept if value is not None))


def command(
    program: Sequence[str], shared: Sequence[str], overrides: Sequence[str], folder: str, number: int
) -> tuple[str, ...]:
    """What starts one run.

    Args:
        program: from :func:`this_program`.
        shared: the sweep's overrides of Hydra's own configuration.
        overrides: the run's overrides, in Hydra's grammar.
        folder: the run's folder.
        number: the run's number in the sweep; configurations may ask for ``hydra.job.num``.
    """
    kept = [override for override in shared if override.partition("=")[0].lstrip("+~") not in _SET_HERE]
    ours = ("hydra.mode=RUN", f"hydra.run.dir={_quoted(folder)}", f"hydra.job.id='{number}'", f"hydra.job.num={number}")
    return (*program, *kept, *overrides, *ours)


def _quoted(text: str) -> str:
    """A value in Hydra's grammar that comes out as ``text``."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text.replace("${", "\\${"), Quote.single).with_quotes()


def what_differs(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """Of each run the overrides that not every run has, in their order; of a single one all."""
    common = set.intersection(*map(set, job_overrides)) if len(job_overrides) > 1 else set()
    return [" ".join(one for one in overrides if one not in common) or "(no override)" for overrides in job_overrides]


def run_in_turn(jobs: Sequence[Job]) -> None:
    """Run them one after the other, telling on stderr which is started and, at the end, how each ended.

    Each has a session of its own, so that Ctrl-C comes to it from here alone, and once. SIGINT, SIGTERM and SIGHUP are
    handed on to the running one where this is called from the main thread, and no other is started.

    Raises:
        SystemExit: a run failed (code 1 and a message), or a signal arrived (128 and its number).
    """
    outcomes: list[Outcome] = []
    with _Runner.listening() as runner:
        for number, job in enumerate(jobs, 1):
            _tell(f"[{number}/{len(jobs)}] {job.told} -> {job.folder}")
            outcomes.append(runner.run(job))
            if runner.stopped_by is not None:
                break
    for line in _table(jobs, outcomes):
        _tell(line)
    if runner.stopped_by is not None:
        _tell(f"verl_fp16: {signal.Signals(runner.stopped_by).name}: the sweep was ended")
        raise SystemExit(128 + runner.stopped_by)
    failed = [outcome for outcome in outcomes if outcome.code]
    if failed:
        listed = "; ".join(f"{outcome.job.told} ({outcome.ending})" for outcome in failed)
        raise SystemExit(f"verl_fp16: {len(failed)} of {len(jobs)} runs failed: {listed}")


class _Runner:
    """Runs a command, handing on the signals that arrive meanwhile.

    Attributes:
        stopped_by: the first signal that arrived.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self._running: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextlib.contextmanager
    def listening(cls) -> Iterator[_Runner]:
        runner, previous = cls(), {}
        if threading.current_thread() is threading.main_thread():
            # Ignored means that whoever started us wants us to live on, as nohup does.
            heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            previous = {number: signal.signal(number, runner._hand_on) for number in heard}
        try:
            yield runner
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self, job: Job) -> Outcome:
        started = time.monotonic()
        sys.stdout.flush()
        if self.stopped_by is not None:  # since the line that told of it
            return Outcome(job, 128 + self.stopped_by, 0.0)
        try:
            self._running = subprocess.Popen(job.command, start_new_session=True)
        except OSError as error:
            _tell(f"verl_fp16: {job.told} cannot be started: {error.strerror or error}")
            return Outcome(job, CANNOT_START, 0.0)
        if self.stopped_by is not None:  # it arrived when there was nobody to hand it on to
            self._signal(self.stopped_by)
        code = self._running.wait()
        self._running = None
        return Outcome(job, code if code >= 0 else 128 - code, time.monotonic() - started)

    def _hand_on(self, number: int, _frame: object) -> None:
        if self.stopped_by is None:
            self.stopped_by = number
        if self._running is not None:
            self._signal(number)

    def _signal(self, number: int) -> None:
        """To the whole group, as a terminal does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._running.pid, number)


def _table(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> Iterator[str]:
    from verl_fp16.run_report.contents import duration

    rows = [(one.job.told, one.job.folder, one.ending, duration(one.seconds)) for one in outcomes]
    rows += [(job.told, job.folder, "not started", "") for job in jobs[len(outcomes) :]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
