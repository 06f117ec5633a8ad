"""Data sets on disk in the forms that people have them in."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_fp16.data_sets.errors import DataSetError


def save_arrow(file: Path, rows: list[dict], opened=pa.ipc.new_stream) -> Path:
    table = pa.Table.from_pylist(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    with opened(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return file


def save_parquet(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def save_lines(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_of(*numbers: object) -> list[dict]:
    return [{"question": f"Q{number}?", "answer": f"So it is {number}.\n#### {number}"} for number in numbers]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        save_lines(folder / name, rows_of(1))


def refused(match: str, function, *arguments):
    with pytest.raises(DataSetError, match=match) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)
