"""From the columns of a data set to the rows that verl trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_fp16.data_sets.answers import NoAnswer
from verl_fp16.data_sets.errors import DataSetError
from verl_fp16.data_sets.reading import read_columns
from verl_fp16.data_sets.tasks import Task

if TYPE_CHECKING:
    import pyarrow as pa

ABILITY, STYLE, ROLE = "math", "rule", "user"
VERLS_OWN = ("data_source", "prompt", "reward_model")
"""Columns of data that verl reads as they are."""
FILE_KEYS = {"train": "data.train_files", "test": "data.val_files"}
"""Split -> the key by which verl is given its file."""


@dataclass(frozen=True)
class Options:
    """What is asked for beside the data.

    Args:
        question: the question's column; None for the first known name.
        answer: the answer's column; None for the first known name.
        limit: of each split the first so many rows; None for all.
        skip_bad: leave out rows without a question or a final answer, which otherwise are an error.
    """

    question: str | None = None
    answer: str | None = None
    limit: int | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class Converted:
    """One split.

    Args:
        table: verl's rows.
        left_out: a line for each row that was left out, with its file and number.
    """

    table: pa.Table
    left_out: tuple[str, ...]


def convert(task: Task, splits: Mapping[str, Sequence[Path]], options: Options) -> dict[str, Converted]:
    """All splits, by name.

    Raises:
        DataSetError: a file cannot be read, lacks a column or is verl's already; a row is bad, or all of them are.
    """
    return {split: _convert_split(task, split, files, options) for split, files in splits.items()}


def _convert_split(task: Task, split: str, files: Sequence[Path], options: Options) -> Converted:
    good: list[tuple[int, str, str, str]] = []  # index, question, answer, ground truth
    bad: list[str] = []
    seen = 0
    for file in files:
        room = None if options.limit is None else options.limit - seen
        if room == 0:
            break
        questions, answers, find = _read(task, split, file, options)
        for row, (question, answer) in enumerate(zip(questions[:room], answers[:room], strict=True)):
            try:
                text = _text(answer, "answer")
                good.append((seen, _text(question, "question"), text, find(text)))
            except NoAnswer as error:
                bad.append(f"{file}, row {row} (from 0): {error}")
            seen += 1
    if not seen:
        raise DataSetError(f"{files[0]}: there is no row in it")
    if bad and not options.skip_bad:
        others = f"{len(bad) - 1:,} other row{'s are' if bad[2:] else ' is'} bad too. " if bad[1:] else ""
        raise DataSetError(f"{bad[0]}. {others}Mend them, or leave such rows out with --skip-bad")
    if not good:
        raise DataSetError(f"{bad[0]}. None of the {seen:,} rows of {split} is left: --skip-bad cannot help here")
    return Converted(_table(task, split, good), tuple(bad))


def _read(
    task: Task, split: str, file: Path, options: Options
) -> tuple[Sequence[Any], Sequence[Any], Callable[[str], str]]:
    """Questions and answers of ``file``, and what finds a final answer in the latter."""
    chosen: list[str] = []

    def choose(names: Sequence[str]) -> Sequence[str]:
        if names and all(name in names for name in VERLS_OWN):
            raise DataSetError(
                f"{file}: this has verl's own columns already ({', '.join(VERLS_OWN)}) and needs no conversion: use it "
                f"as it is, with {FILE_KEYS[split]}={file}"
            )
        if names:
            chosen.append(_column(file, names, options.question, task.questions, "question"))
            chosen.append(_column(file, names, options.answer, tuple(task.answers), "answer"))
        return list(dict.fromkeys(chosen))

    columns = read_columns(file, choose)
    if not chosen:  # an empty array of JSON
        return (), (), task.answer
    question, answer = chosen
    return columns[question], columns[answer], task.answers.get(answer, task.answer)


def _column(file: Path, names: Sequence[str], wanted: str | None, known: Sequence[str], kind: str) -> str:
    found = [name for name in ((wanted,) if wanted is not None else known) if name in names]
    if found:
        return found[0]
    here = f"Here are {', '.join(sorted(names))}"
    if wanted is not None:
        raise DataSetError(f"{file}: there is no column {wanted}, which --{kind}-column names. {here}")
    others = f", nor {' or '.join(known[1:])}"
    raise DataSetError(
        f"{file}: there is no column {known[0]}{others}. {here}. Name the {kind}'s column with --{kind}-column"
    )


def _text(value: Any, kind: str) -> str:
    """
    Raises:
        NoAnswer: it is no text, or cannot be written as UTF-8; an answer may be an integer.
    """
    if isinstance(value, int) and not isinstance(value, bool) and kind == "answer":
        return str(value)
    if value is None:
        raise NoAnswer(f"its {kind} is missing")
    if not isinstance(value, str):
        raise NoAnswer(f"its {kind} has to be text, and is of type {type(value).__name__}")
    if not value.strip():
        raise NoAnswer(f"its {kind} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise NoAnswer(f"its {kind} has half of a character (a lone surrogate)") from None
    return value


def _table(task: Task, split: str, rows: Sequence[tuple[int, str, str, str]]) -> pa.Table:
    import pyarrow as pa

    index, questions, answers, truths = zip(*rows, strict=True)

    def same(text: str) -> pa.Array:
        return pa.repeat(text, len(rows))

    def struct(**fields: Any) -> pa.Array:
        return pa.StructArray.from_arrays([pa.array(field) for field in fields.values()], list(fields))

    messages = struct(role=same(ROLE), content=[f"{question} {task.instruction}" for question in questions])
    return pa.table(
        {
            "data_source": same(task.data_source),
            "prompt": pa.ListArray.from_arrays(pa.array(range(len(rows) + 1), pa.int32()), messages),
            "ability": same(ABILITY),
            "reward_model": struct(style=same(STYLE), ground_truth=truths),
            "extra_info": struct(split=same(split), index=index, question=questions, answer=answers),
        }
    )
