"""What was counted so far, on disk: one line a question, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from verl_fp16.made_of import differences
from verl_fp16.sanity_set.errors import SanitySetError

_BEGINNING = b'{"made_of": '


class Counted(NamedTuple):
    """One question's answers.

    Args:
        row: its number in the data.
        answers: how many were sampled.
        correct: how many of them were right.
        cut: how many ended at the longest length, not by themselves.
    """

    row: int
    answers: int
    correct: int
    cut: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.answers


class Progress:
    """The questions that were counted, in a file that grows by a line each.

    Args:
        file: where.
        made_of: everything that decides the answers; a file that was made of something else is refused.

    Raises:
        SanitySetError: the file is of another run, or cannot be read or written.
    """

    def __init__(self, file: Path, made_of: Mapping[str, Any]) -> None:
        self.file = file
        self.counted: dict[int, Counted] = {}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            whole = self._read(dict(made_of)) if file.exists() else 0
            # Without a buffer, which would be written at the end what a full disk had no room for.
            self._log = open(file, "r+b" if file.exists() else "w+b", buffering=0)
            # A line that a crash left half written is written anew.
            self._end_at(whole)
            if not whole:
                self._append({"made_of": dict(made_of)})
        except OSError as error:
            raise SanitySetError(f"{file}: it cannot be written ({error.strerror})") from None

    def _read(self, made_of: dict[str, Any]) -> int:
        """Take in what is there; returns the length of the lines that stay."""
        whole, there = 0, None
        with open(self.file, "rb") as log:
            for number, line in enumerate(log, 1):
                if number == 1 and not line.startswith(_BEGINNING[: len(line)]):
                    raise self._is_none()
                if not line.endswith(b"\n"):
                    break
                if number == 1:
                    there = self._made_of(line)
                else:
                    counted = self._counted(number, line)
                    self.counted[counted.row] = counted
                whole += len(line)
        if not self.counted:  # nothing was made of what it was begun with
            return 0
        self._check(there, made_of)
        return whole

    def _made_of(self, line: bytes) -> dict[str, Any]:
        try:
            return dict(json.loads(line)["made_of"])
        except (ValueError, TypeError, KeyError):
            raise self._is_none() from None

    def _counted(self, number: int, line: bytes) -> Counted:
        try:
            counted = Counted(**json.loads(line))
            if all(type(value) is int for value in counted) and 0 <= counted.correct <= counted.answers > 0:
                return counted
        except (ValueError, TypeError):
            pass
        raise SanitySetError(
            f"{self.file}, line {number}: it is damaged. Remove that line, whose question is then sampled again, or "
            "begin anew with --restart"
        )

    def _is_none(self) -> SanitySetError:
        return SanitySetError(f"{self.file}: this is no progress of a sanity set. Name another --output")

    def _check(self, there: dict[str, Any], made_of: dict[str, Any]) -> None:
        if told := differences(there, made_of):
            raise SanitySetError(
                f"{self.file} was begun with something else ({told}). Go on with what it was begun with, name another "
                "--output, or begin anew with --restart"
            )

    def add(self, counted: Counted) -> None:
        """Keep one question's counts, also over a crash of the machine's processes.

        Raises:
            SanitySetError: the disk is full; what was written before stays.
        """
        try:
            self._append(counted._asdict())
        except OSError as error:
            raise SanitySetError(f"{self.file}: it cannot be written ({error.strerror})") from None
        self.counted[counted.row] = counted

    def _append(self, entry: dict[str, Any]) -> None:
        line, whole = memoryview(json.dumps(entry).encode() + b"\n"), self._log.tell()
        try:
            while line:
                line = line[self._log.write(line) :]
        except OSError:
            self._end_at(whole)
            raise

    def _end_at(self, size: int) -> None:
        self._log.truncate(size)
        self._log.seek(size)

    def close(self) -> None:
        self._log.close()
