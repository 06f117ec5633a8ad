"""Rows of a Parquet or JSON lines file, one after the other, and prompts from them or from text. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

_BATCH = 256  # rows of a file that are in memory at a time
_MAGIC = b"PAR1"
_CONTEXT = 60
_GIVE = "Give verl's Parquet, JSON lines, or where prompts are wanted text with one a line"
_PROMPT = "prompt"
_NO_TEXT = (".jsonl", ".json", ".ndjson", ".parquet")


class RowsError(ValueError):
    """A file of rows cannot be used: one line that names the file, the row and the fix."""


def read_rows(file: Path, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of ``file`` as they are, in its order.

    Args:
        needed: columns that each of them has to have.

    Raises:
        RowsError: it is not there, empty, neither Parquet nor JSON lines, or lacks a column.
    """
    yield from _parquet_rows(file, needed) if is_parquet(file) else _json_rows(file, needed)


def _json_rows(file: Path, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RowsError(
                f"{file}, line {number}: this is no JSON ({error}). Give verl's Parquet, or a JSON object a line"
            ) from None
        if not isinstance(row, dict):
            raise RowsError(f"{file}, line {number}: this is no JSON object. Give one a line")
        _check_columns(file, row, needed, f", line {number}")
        yield row


def is_parquet(file: Path) -> bool:
    """Whether it begins as Parquet does.

    Raises:
        RowsError: it cannot be read, or is empty.
    """
    try:
        with open(file, "rb") as opened:
            first = opened.read(len(_MAGIC))
    except FileNotFoundError:
        raise RowsError(f"{file}: there is no such file. {_GIVE}") from None
    except IsADirectoryError:
        raise RowsError(f"{file}: this is a folder. Name the file in it") from None
    except OSError as error:
        raise RowsError(f"{file}: it cannot be read ({error.strerror})") from None
    if not first:
        raise RowsError(f"{file}: the file is empty. {_GIVE}")
    return first == _MAGIC


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        row: its number in the file, from 0 on; empty lines are not counted.
        content: chat messages, each with ``role`` and ``content``; or text, which no chat template is put around.
    """

    row: int
    content: str | list[dict[str, Any]]


def read_prompts(file: Path, limit: int | None = None) -> Iterator[Prompt]:
    """The first ``limit`` prompts, or all: of Parquet or JSON lines (column ``prompt``: messages, or text), or of text.

    What does not end with .parquet, .jsonl, .json or .ndjson, and does not begin as Parquet does, is text, with a
    prompt a line. Empty lines are none. Rows after the last one asked for, and other columns of Parquet, are not read.

    Raises:
        RowsError: as :func:`read_rows`; a prompt is neither messages nor text; there is none.
    """
    row = -1
    for row, content in enumerate(islice(_contents(file), limit)):
        yield Prompt(row, content)
    if row < 0:
        raise RowsError(f"{file}: there is no prompt in it. {_GIVE}")


def _contents(file: Path) -> Iterator[str | list[dict[str, Any]]]:
    parquet = is_parquet(file)
    if not parquet and file.suffix not in _NO_TEXT:
        yield from (line for _, line in _lines(file))
        return
    needed = (_PROMPT,)
    records = _parquet_rows(file, needed, only=needed) if parquet else _json_rows(file, needed)
    for row, record in enumerate(records):
        content = record[_PROMPT]
        if not (isinstance(content, str) and content.strip()) and not is_messages(content):
            raise RowsError(
                f"{file}, row {row}: prompt has to be text, or a list of messages with role and content, and is "
                f"{repr(content)[:_CONTEXT]}"
            )
        yield content


def is_messages(value: Any) -> bool:
    """Whether it is a chat as verl's data has it."""
    return isinstance(value, list) and bool(value) and all(_is_message(message) for message in value)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message


def _parquet_rows(file: Path, needed: Sequence[str], only: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            _check_columns(file, parquet.schema_arrow.names, needed)
            for batch in parquet.iter_batches(batch_size=_BATCH, columns=only):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise RowsError(f"{file}: it is damaged, or was not copied whole ({told}). Copy it again") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines with something in them, by their numbers from 1 on."""
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise RowsError(f"{file}: this is no UTF-8 text. Give verl's Parquet, or JSON lines or text in UTF-8") from None


def _check_columns(file: Path, there: Any, needed: Sequence[str], where: str = "") -> None:
    for name in needed:
        if name not in there:
            raise RowsError(
                f"{file}{where}: there is no column {name}. Needed are {', '.join(needed)}; here are "
                f"{', '.join(sorted(map(str, there))) or 'none'}"
            )
