"""Questions in verl's format, from Parquet or JSON lines, one after the other. Imports no torch.

A row has ``prompt`` (chat messages, each with ``role`` and ``content``), ``data_source`` and ``reward_model`` with a
``ground_truth``; ``extra_info`` goes to the reward function where it is there, and every other column is carried along.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_fp16.sanity_set.errors import SanitySetError

NEEDED = ("prompt", "data_source", "reward_model")
_BATCH = 256  # rows of a file that are in memory at a time
_MAGIC = b"PAR1"


@dataclass(frozen=True)
class Question:
    """One row.

    Args:
        row: its number in the file, from 0 on.
        messages: the prompt, as a chat template takes it.
        data_source: verl's name of where it comes from; the reward function gets it.
        ground_truth: what the reward function compares with.
        extra_info: what else the reward function gets.
    """

    row: int
    messages: list[dict[str, Any]]
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]


def count(file: Path) -> int:
    """Rows of ``file``.

    Raises:
        SanitySetError: it is not there, empty, or neither Parquet nor JSON lines.
    """
    if is_parquet(file):
        import pyarrow.parquet as pq

        return pq.ParquetFile(file).metadata.num_rows
    with open(file, "rb") as lines:
        return sum(1 for line in lines if line.strip())


def read(file: Path) -> Iterator[Question]:
    """The questions of ``file``, in its order.

    Raises:
        SanitySetError: as :func:`count`; a column is missing, or a row is none of verl's; with its number.
    """
    number = -1
    for number, record in enumerate(records(file)):
        yield _question(file, number, record)
    if number < 0:
        raise SanitySetError(f"{file}: there is no row in it")


def records(file: Path) -> Iterator[dict[str, Any]]:
    """The rows as they are."""
    if is_parquet(file):
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as parquet:
            _check_columns(file, parquet.schema_arrow.names)
            for batch in parquet.iter_batches(batch_size=_BATCH):
                yield from batch.to_pylist()
        return
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise SanitySetError(
                    f"{file}, line {number}: this is no JSON ({error}). Give verl's Parquet, or a JSON object a line"
                ) from None
            if not isinstance(record, dict):
                raise SanitySetError(f"{file}, line {number}: this is no JSON object. Give one a line")
            _check_columns(file, record, f", line {number}")
            yield record


def is_parquet(file: Path) -> bool:
    """Whether it begins as Parquet does.

    Raises:
        SanitySetError: it cannot be read, or is empty.
    """
    try:
        with open(file, "rb") as opened:
            first = opened.read(len(_MAGIC))
    except FileNotFoundError:
        raise SanitySetError(f"{file}: there is no such file. Give verl's Parquet, or JSON lines") from None
    except IsADirectoryError:
        raise SanitySetError(f"{file}: this is a folder. Name the file in it") from None
    except OSError as error:
        raise SanitySetError(f"{file}: it cannot be read ({error.strerror})") from None
    if not first:
        raise SanitySetError(f"{file}: the file is empty")
    return first == _MAGIC


def _check_columns(file: Path, there: Any, where: str = "") -> None:
    for name in NEEDED:
        if name not in there:
            raise SanitySetError(
                f"{file}{where}: there is no column {name}. verl's data has {', '.join(NEEDED)}; here are "
                f"{', '.join(sorted(map(str, there))) or 'none'}"
            )


def _question(file: Path, row: int, record: Mapping[str, Any]) -> Question:
    messages, reward = record["prompt"], record["reward_model"]
    if not (isinstance(messages, list) and messages and all(_is_message(message) for message in messages)):
        raise SanitySetError(f"{file}, row {row}: prompt has to be a list of messages with role and content")
    if not isinstance(reward, Mapping) or "ground_truth" not in reward:
        raise SanitySetError(f"{file}, row {row}: reward_model has no ground_truth")
    extra = record.get("extra_info")
    return Question(
        row, messages, str(record["data_source"]), reward["ground_truth"], dict(extra) if extra is not None else {}
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message
