"""Columns of one file: Parquet, Arrow as ``datasets`` saves it, JSON lines or a JSON array, gzipped or not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from verl_fp16.data_sets.errors import DataSetError

Choose = Callable[[Sequence[str]], Sequence[str]]
"""The names of a file's columns in, those that are wanted out; raises where one is missing."""

_PARQUET, _ARROW_FILE, _ARROW_STREAM, _GZIP = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"\x1f\x8b"
_LFS = b"version https://git-lfs"
_FORMS = "Parquet, Arrow as datasets saves it, JSON lines or a JSON array"


def read_columns(file: Path, choose: Choose) -> dict[str, list[Any]]:
    """The columns of ``file`` that ``choose`` wants, by name, all of the same length; what a row lacks is None.

    What the file is, its first bytes say, not its name.

    Raises:
        DataSetError: it is not there, cannot be read, is empty, damaged, or nothing of these.
    """
    try:
        with open(file, "rb") as opened:
            first = opened.read(len(_LFS))
        if first.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)):
            return _arrow_columns(file, first, choose)
        content = file.read_bytes()
        return _json_columns(file, gzip.decompress(content) if first.startswith(_GZIP) else content, choose)
    except FileNotFoundError:
        raise DataSetError(f"{file}: there is no such file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(file, error) from None
    except OSError as error:
        raise DataSetError(f"{file}: it cannot be read ({error.strerror or error})") from None


def _damaged(file: Path, error: Exception) -> DataSetError:
    told = " ".join(str(error).split())[:200]
    return DataSetError(f"{file}: it is damaged, or was not copied whole ({told}). Copy it again")


def _arrow_columns(file: Path, first: bytes, choose: Choose) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if first.startswith(_PARQUET):
            with pq.ParquetFile(file) as parquet:
                table = parquet.read(columns=_once(file, parquet.schema_arrow.names, choose))
        else:
            with pa.memory_map(str(file)) as source:
                opened = pa.ipc.open_file if first.startswith(_ARROW_FILE) else pa.ipc.open_stream
                whole = opened(source).read_all()
                table = whole.select(_once(file, whole.column_names, choose))
        return {name: table.column(name).to_pylist() for name in table.column_names}
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


def _once(file: Path, names: Sequence[str], choose: Choose) -> list[str]:
    chosen = list(choose(names))
    for name in chosen:
        if names.count(name) > 1:
            raise DataSetError(f"{file}: there are {names.count(name)} columns {name}. Leave one of them")
    return chosen


def _json_columns(file: Path, content: bytes, choose: Choose) -> dict[str, list[Any]]:
    if not content.strip():
        raise DataSetError(f"{file}: the file is empty. Give {_FORMS}")
    if content.startswith(_LFS):
        raise DataSetError(
            f"{file}: this is a pointer of Git LFS, not the data. Fetch the data there with git lfs pull"
        )
    try:
        text = content.decode("utf-8-sig").lstrip()
    except UnicodeDecodeError:
        raise DataSetError(f"{file}: this is neither Parquet nor UTF-8 text. Give {_FORMS}") from None
    if text[0] not in "[{":
        raise DataSetError(f"{file}: this is neither {_FORMS.replace(' or ', ' nor ')}, and they are what is read")
    rows = _array(file, text) if text[0] == "[" else _lines(file, text)
    names = choose(list(dict.fromkeys(name for row in rows for name in row)))
    return {name: [row.get(name) for row in rows] for name in names}


def _array(file: Path, text: str) -> list[dict[str, Any]]:
    rows = _parsed(file, text, "")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataSetError(f"{file}, row {number} (from 0): this is no JSON object. Give an array of objects")
    return rows


def _lines(file: Path, text: str) -> list[dict[str, Any]]:
    # Not splitlines(): U+2028 and its like stand inside of strings.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if _loads(lines[0][1]) is None and (whole := _loads(text)) is not None:
        # One object over many lines, as each problem of the original MATH is a file of its own.
        return [whole]
    rows = [_parsed(file, line, f", line {number}") for number, line in lines]
    for (number, _), row in zip(lines, rows, strict=True):
        if not isinstance(row, dict):
            raise DataSetError(f"{file}, line {number}: this is no JSON object. Give one a line")
    return rows


def _loads(text: str) -> Any:
    """What ``text`` is as JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parsed(file: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataSetError(
            f"{file}{where}: this is no JSON ({error}). Give a JSON object a line, or an array of them"
        ) from None
