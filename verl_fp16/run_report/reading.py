"""Reading the lines of verl's file logger, ``{"step": int, "data": {name: number}}``, whatever state they are in.

A run that was killed leaves half a line, a full disk a tail of zeros, a resumed run steps that are there twice. What is
no entry is passed over and counted. One line and the numbers that are wanted are in memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from verl_fp16.file_log import RESUMED_KEY
from verl_fp16.log_entries import as_number, parse_entry

LONGEST_LINE = 2**24
"""Bytes; a step of verl's has some thousand. What is longer, as the zeros of a disk that ran full, is not held."""

_REPORTED_BYTES = 2**20
_MOST_NAMES = 100_000
_ABSENT = object()


class Series(NamedTuple):
    """One metric of a run.

    Attributes:
        steps: int64, rising.
        values: float64, as many; nan or inf where it was logged and was no finite number.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass
class PassedOver:
    """What was not taken from a log.

    Attributes:
        half_written: the last line, where it breaks off.
        broken: other lines that are no entries: no JSON, or without a step and data.
        too_long: lines longer than :data:`LONGEST_LINE`.
        texts: values of wanted metrics that are no numbers.
        again: entries of a step that an earlier run had logged; the later values count.
        undone: entries past the step from which a run was taken up again.
    """

    half_written: int = 0
    broken: int = 0
    too_long: int = 0
    texts: int = 0
    again: int = 0
    undone: int = 0


@dataclass(frozen=True)
class RunLog:
    """What was read of a log.

    Attributes:
        path: the file.
        steps: int64, rising: the steps that have an entry.
        series: metric -> its course, of the wanted ones that are in the log.
        resumed: the steps from which the run was taken up again.
        passed_over: what was not taken.
    """

    path: Path
    steps: np.ndarray
    series: dict[str, Series]
    resumed: tuple[int, ...]
    passed_over: PassedOver


def read_log(path: Path, wanted: Callable[[str], bool], advance: Callable[[int], object] | None = None) -> RunLog:
    """Read what is wanted of a log.

    Args:
        path: the file; it may still be written to.
        wanted: whether a metric is, by its name; asked once for each name.
        advance: told now and then how many bytes were read since it was told last.

    Raises:
        OSError: it cannot be read.
    """
    collector = _Collector(wanted)
    with open(path, "rb") as file:
        unreported = 0
        for line, size in _lines(file):
            collector.take(line)
            unreported += size
            if advance is not None and unreported >= _REPORTED_BYTES:
                advance(unreported)
                unreported = 0
    if advance is not None:
        advance(unreported)
    return collector.result(path)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes | None, int]]:
    """Each line that is not blank, None for one that is too long, with its size in bytes."""
    while line := file.readline(LONGEST_LINE):
        size = len(line)
        if size == LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                size += len(rest)
            yield None, size + len(rest)
        elif not line.isspace():
            yield line, size


class _Collector:
    """Takes lines in the order of the file."""

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self._wanted = wanted
        self._seen: set[str] = set()
        self._columns: dict[str, tuple[array, array]] = {}
        self._steps = array("q")
        self._resumed: list[int] = []
        self._passed_over = PassedOver()

    def take(self, line: bytes | None) -> None:
        if line is None:
            self._passed_over.too_long += 1
        elif (entry := parse_entry(line)) is None:
            if line.endswith(b"\n"):
                self._passed_over.broken += 1
            else:
                self._passed_over.half_written += 1
        elif RESUMED_KEY in entry[1]:
            self._resume(entry[0])
        else:
            self._add(*entry)

    def _resume(self, step: int) -> None:
        """Undo what is past ``step``, where the run could not do so in the file."""
        self._resumed = [before for before in self._resumed if before < step] + [step]
        if self._steps and max(self._steps) > step:
            kept = array("q", (before for before in self._steps if before <= step))
            self._passed_over.undone += len(self._steps) - len(kept)
            self._steps = kept
            for name, (steps, values) in self._columns.items():
                pairs = [pair for pair in zip(steps, values, strict=True) if pair[0] <= step]
                self._columns[name] = array("q", (p[0] for p in pairs)), array("d", (p[1] for p in pairs))

    def _add(self, step: int, data: dict[str, Any]) -> None:
        if self._steps and step < self._steps[-1]:
            self._passed_over.again += 1
        self._steps.append(step)
        if not data.keys() <= self._seen:
            self._learn(data)
        get = data.get
        for name, (steps, values) in self._columns.items():
            value = get(name, _ABSENT)
            if value is _ABSENT:
                continue
            if type(value) is not float:
                value = as_number(value)
                if value is None:
                    self._passed_over.texts += 1
                    continue
            steps.append(step)
            values.append(value)

    def _learn(self, data: dict[str, Any]) -> None:
        if len(self._seen) > _MOST_NAMES:  # a log that has other names in each line
            self._seen.clear()
        for name in data.keys() - self._seen:
            self._seen.add(name)
            if name not in self._columns and self._wanted(name):
                self._columns[name] = array("q"), array("d")

    def result(self, path: Path) -> RunLog:
        series = {
            name: _in_order(np.frombuffer(steps, np.int64), np.frombuffer(values))
            for name, (steps, values) in self._columns.items()
            if steps
        }
        steps = np.unique(np.frombuffer(self._steps, np.int64)) if self._steps else np.empty(0, np.int64)
        return RunLog(path, steps, series, tuple(self._resumed), self._passed_over)


def _in_order(steps: np.ndarray, values: np.ndarray) -> Series:
    """By rising step; of several values of a step, the one that was logged last."""
    if len(steps) > 1 and not (np.diff(steps) > 0).all():
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        last = np.append(np.diff(steps) > 0, True)
        steps, values = steps[last], values[last]
    return Series(steps, values)
