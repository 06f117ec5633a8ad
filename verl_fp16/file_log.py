"""The file log of a run that resumes: what was logged up to the checkpoint stays, what will be logged anew goes.

Plain Python, for the lines of verl's file logger: ``{"step": ..., "data": {...}}``, one JSON object a line. Where verl
opens its file, and when it is known whether a run resumes, is the matter of :mod:`verl_fp16.hooks.file_log`.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

RESUMED_KEY = "verl_fp16/resumed_from_step"


class Lines(NamedTuple):
    """How many lines of a log were kept and dropped.

    Attributes:
        kept: whole lines of steps up to the resumed one, earlier marks included.
        later: whole lines of later steps: dropped, the resumed run takes these steps anew.
        broken: what is no line of the logger's, such as one that a crash left half written: dropped.
    """

    kept: int
    later: int
    broken: int


def mark(resumed_step: int) -> bytes:
    """The line that says where a run was taken up again, in the format of verl's file logger."""
    entry = {"step": resumed_step, "data": {RESUMED_KEY: resumed_step}}
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def continue_log(path: str | os.PathLike[str], resumed_step: int) -> Lines:
    """Drop what a run that goes on after ``resumed_step`` logs anew, and append the mark.

    A log with nothing to drop is only appended to. Any other one is replaced by a new file in one step, so that at no
    time less than what is to be kept is there; it has the old one's permissions, and a link still leads to it. A
    missing log starts with the mark. One line at a time is in memory.

    Args:
        path: the log, or a link to it.
        resumed_step: the step of the checkpoint that the run resumed from, counted from 1.

    Raises:
        OSError: the file, or one beside it, cannot be read or written; the log is then as it was.
    """
    path = os.path.realpath(path)
    with open(path, "a+b") as log:
        log.seek(0)
        kept = 0
        for line in log:
            if not line.endswith(b"\n") or _judge(line, resumed_step) != "kept":
                return _rewrite(path, log, kept, resumed_step)
            kept += 1
        log.write(mark(resumed_step))
    return Lines(kept, 0, 0)


def _rewrite(path: str, log: BinaryIO, leading: int, resumed_step: int) -> Lines:
    """As :func:`continue_log`; the first ``leading`` lines are known to be kept."""
    counts = {"kept": leading, "later": 0, "broken": 0}
    folder, name = os.path.split(path)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{name}.", suffix=".tmp", delete=False) as new:
        try:
            shutil.copymode(path, new.name)
            log.seek(0)
            new.writelines(itertools.islice(log, leading))
            for line in log:
                verdict = _judge(line, resumed_step)
                counts[verdict] += 1
                if verdict == "kept":
                    new.write(line if line.endswith(b"\n") else line + b"\n")
            new.write(mark(resumed_step))
            new.flush()
            os.fsync(new.fileno())
            os.replace(new.name, path)
        finally:
            Path(new.name).unlink(missing_ok=True)
    return Lines(**counts)


def _judge(line: bytes, resumed_step: int) -> str:
    """``kept``, ``later`` or ``broken``."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):  # the latter for brackets without end
        return "broken"
    step = entry.get("step") if isinstance(entry, dict) else None
    if not isinstance(step, int) or isinstance(step, bool):
        return "broken"
    return "kept" if step <= resumed_step else "later"
