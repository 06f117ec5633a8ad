"""Prompts from a file, read row by row: verl's parquet, JSON lines, or a text file. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

COLUMN = "prompt"
_JSON = (".jsonl", ".json", ".ndjson")
_KINDS = f"a parquet file or JSON lines with {COLUMN!r}, or a text file with one prompt a line"
_ROWS_AT_ONCE = 64
_NAMED = 10


class PromptsError(ValueError):
    """Prompts cannot be used: one line that names the file, the row and what to do."""


@dataclass(frozen=True)
class Prompt:
    """One row.

    Args:
        row: its number, from 1 on; of text, the line's.
        content: a text, or chat messages: objects with ``role`` and ``content``.
    """

    row: int
    content: str | list[dict[str, Any]]


def read_prompts(file: Path, limit: int | None = None) -> list[Prompt]:
    """The first ``limit`` prompts of a file, or all; no further rows are read.

    Args:
        file: ``.parquet``, as verl's data sets are, with a column ``prompt``; ``.jsonl``, ``.json`` or ``.ndjson`` with
            a JSON object a line; any other is UTF-8 text with a prompt a line, in which empty lines are left out.

    Raises:
        PromptsError: there is no such file, there is no prompt in it, or a row is none.
        ImportError: there is no pyarrow to read parquet with.
    """
    file = file.expanduser()
    if file.is_dir():
        raise PromptsError(f"{file}: this is a folder. Name a file: {_KINDS}")
    try:
        prompts = list(islice(_rows(file), limit))
    except FileNotFoundError:
        raise PromptsError(f"{file}: there is no such file. Name {_KINDS}") from None
    except UnicodeDecodeError:
        raise PromptsError(f"{file}: it is not UTF-8 text. Name {_KINDS}") from None
    except OSError as error:
        raise PromptsError(f"{file}: it cannot be read ({error.strerror or error})") from None
    if not prompts:
        raise PromptsError(f"{file}: there is no prompt in it. Name {_KINDS}")
    return prompts


def _rows(file: Path) -> Iterator[Prompt]:
    if file.suffix == ".parquet":
        yield from _of_parquet(file)
    elif file.suffix in _JSON:
        yield from _of_json_lines(file)
    else:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Prompt(number, line.rstrip("\r\n"))


def _of_parquet(file: Path) -> Iterator[Prompt]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            if COLUMN not in table.schema_arrow.names:
                raise _no_column(file, table.schema_arrow.names)
            batches = table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[COLUMN])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for number, value in enumerate(values, 1):
                yield _prompt(file, number, value)
    except pyarrow.ArrowException as error:
        told = " ".join(str(error).split())
        raise PromptsError(f"{file}: it cannot be read as parquet ({told}). Write or copy it again") from None


def _of_json_lines(file: Path) -> Iterator[Prompt]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise PromptsError(
                    f"{file}: line {number} is no JSON ({error}). Each line is to be an object with {COLUMN!r}"
                ) from None
            if not isinstance(row, Mapping):
                raise PromptsError(f"{file}: line {number} is no object. Each line is to be an object with {COLUMN!r}")
            if COLUMN not in row:
                raise _no_column(file, row, f", line {number}")
            yield _prompt(file, number, row[COLUMN])


def _prompt(file: Path, number: int, value: Any) -> Prompt:
    messages = isinstance(value, list) and value and all(isinstance(m, Mapping) and "role" in m for m in value)
    if not (messages or (isinstance(value, str) and value)):
        told = "empty" if value in (None, "", []) else "neither a text nor a list of chat messages with a role"
        raise PromptsError(f"{file}: the {COLUMN} of row {number} is {told}. Leave the row out, or mend it")
    return Prompt(number, value)


def _no_column(file: Path, names: Iterable[str], where: str = "") -> PromptsError:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    there = f"there are {', '.join(map(str, names[:_NAMED]))}{more}" if names else "there is none"
    return PromptsError(f"{file}{where}: it has no column {COLUMN!r}; {there}. Rename the one with the prompts")
