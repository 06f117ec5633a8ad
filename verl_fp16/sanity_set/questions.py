"""Questions in verl's format, from Parquet or JSON lines, one after the other. Imports no torch.

A row has ``prompt`` (chat messages, each with ``role`` and ``content``), ``data_source`` and ``reward_model`` with a
``ground_truth``; ``extra_info`` goes to the reward function where it is there, and every other column is carried along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_fp16.rows import is_messages, read_rows
from verl_fp16.sanity_set.errors import SanitySetError

NEEDED = ("prompt", "data_source", "reward_model")


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


def read(file: Path) -> Iterator[Question]:
    """The questions of ``file``, in its order.

    Raises:
        RowsError: the file cannot be read, or a column is missing.
        SanitySetError: there is no row, or one is none of verl's; with its number.
    """
    number = -1
    for number, record in enumerate(records(file)):
        yield _question(file, number, record)
    if number < 0:
        raise SanitySetError(f"{file}: there is no row in it")


def records(file: Path) -> Iterator[dict[str, Any]]:
    """The rows as they are."""
    return read_rows(file, NEEDED)


def _question(file: Path, row: int, record: Mapping[str, Any]) -> Question:
    messages, reward = record["prompt"], record["reward_model"]
    if not is_messages(messages):
        raise SanitySetError(f"{file}, row {row}: prompt has to be a list of messages with role and content")
    if not isinstance(reward, Mapping) or "ground_truth" not in reward:
        raise SanitySetError(f"{file}, row {row}: reward_model has no ground_truth")
    extra = record.get("extra_info")
    if extra is not None and not isinstance(extra, Mapping):
        raise SanitySetError(f"{file}, row {row}: extra_info has to be an object")
    return Question(row, messages, str(record["data_source"]), reward["ground_truth"], dict(extra or {}))
