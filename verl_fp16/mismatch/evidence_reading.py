"""Evidence on disk, the reading side: find the tokens.parquet that somebody means, and read it. Imports no torch."""

from __future__ import annotations

import math
import os
import shlex
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_fp16.mismatch.evidence_files import FACTS, SEQUENCES, TOKENS, StepFolder, read_facts, schema, step_folders

if TYPE_CHECKING:
    import pyarrow

_IN_A_RUN = Path("verl_fp16") / "mismatch"
_NAME_ONE = f"Name a {TOKENS}, a folder step_000123, or a run's checkpoint folder (trainer.default_local_dir)"
_MAGIC = b"PAR1"
_UNREADABLE = "It is damaged, or was not copied whole: copy it again, or name another step's folder"


class EvidenceError(ValueError):
    """What was named cannot be read: one line that names the thing, and what to do."""


@dataclass(frozen=True)
class Found:
    """What was read.

    Args:
        file: the tokens.parquet.
        newest_of: the number of step folders of which the newest was taken; None where a step or a file was named.
        others: those that were not taken, by age: the step, and whether it was written on an alarm.
        tokens: a dict of its columns for each token, the worst first.
        sequences: likewise from the sequences.parquet beside it; None where that cannot be read.
        facts: what the facts.json beside it says; empty where that cannot be read.
        notes: what could not be read, and why.
    """

    file: Path
    newest_of: int | None
    others: list[tuple[int, bool]]
    tokens: list[dict[str, Any]]
    sequences: list[dict[str, Any]] | None
    facts: dict[str, Any]
    notes: list[str]


def read(named: Path) -> Found:
    """Read what ``named`` means: a tokens.parquet, a step's folder, one with steps' folders, or a run's.

    Raises:
        EvidenceError: there is none, or it cannot be read.
        ImportError: there is no pyarrow.
    """
    file, taken_from = locate(named)
    newest_of = len(taken_from) if taken_from else None
    others = [(step.step, step.alarm) for step in taken_from[:-1]]
    tokens = sorted(read_table(file, TOKENS), key=_order)
    sequences, facts, notes = None, {}, []
    try:
        sequences = read_table(file.with_name(SEQUENCES), SEQUENCES)
    except EvidenceError as error:
        notes.append(str(error))
    try:
        facts = read_facts(file.with_name(FACTS))
    except FileNotFoundError:
        notes.append(f"{file.with_name(FACTS)}: it is not there; of dtypes and alarms nothing is known")
    except (OSError, ValueError) as error:
        notes.append(f"{file.with_name(FACTS)}: it cannot be read ({_reason(error)})")
    return Found(file, newest_of, others, tokens, sequences, facts, notes)


def gap(token: dict[str, Any]) -> float:
    """|log mu - log pi|, nats; infinite where one of them is not finite."""
    size = abs(token["log_mu"] - token["log_pi"])
    return size if math.isfinite(size) else math.inf


def _order(token: dict[str, Any]) -> tuple[float, int, int, int]:
    return -gap(token), token["rank"], token["row"], token["position"]


def locate(named: Path) -> tuple[Path, list[StepFolder]]:
    """The tokens.parquet that ``named`` means, and the step folders of which it is in the newest, the last; or none.

    Raises:
        EvidenceError: there is none.
    """
    if not stat.S_ISDIR(_status(named)):
        return named, []
    try:
        if (named / TOKENS).exists():
            return named / TOKENS, []
        if steps := _steps_under(named):
            newest = steps[-1].path
            if not (newest / TOKENS).exists():
                raise EvidenceError(f"{newest}: there is no {TOKENS} in it. Name another step's folder")
            return newest / TOKENS, steps
        if (named / FACTS).exists():
            raise EvidenceError(f"{named}: there is no {TOKENS} in it. Name another step's folder")
    except OSError as error:
        raise _inaccessible(Path(error.filename or named), error) from None
    raise EvidenceError(
        f"{named}: there is no folder step_000123 with a {TOKENS} in it, nor in {named / _IN_A_RUN}. {_NAME_ONE}"
    )


def _steps_under(folder: Path) -> list[StepFolder]:
    for place in (folder, folder / _IN_A_RUN, folder / _IN_A_RUN.name):
        if place.is_dir() and (steps := step_folders(place)):
            return steps
    return []


def read_table(file: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of a table, with the types of its schema; a number that is null reads nan, a text "".

    Raises:
        EvidenceError: it is not there, no Parquet, damaged, or lacks a column.
        ImportError: there is no pyarrow.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not stat.S_ISREG(_status(file)):
        raise EvidenceError(f"{file}: this is no file. {_NAME_ONE}")
    try:
        with open(file, "rb") as opened:
            first = opened.read(len(_MAGIC))
        if first != _MAGIC:
            what = "the file is empty" if not first else "this is no Parquet file"
            raise EvidenceError(f"{file}: {what}. {_NAME_ONE}")
        # Not read_table, which takes folders named a=b on the way for partitions.
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            wanted = schema(kind)
            _check_columns(file, kind, parquet.schema_arrow.names, wanted.names)
            table = parquet.read(columns=wanted.names)
        columns = {field.name: _cast(file, table.column(field.name), field) for field in wanted}
        return pa.table(columns).to_pylist()
    except PermissionError as error:
        raise _inaccessible(file, error) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise EvidenceError(f"{file}: it cannot be read as Parquet ({_reason(error)}). {_UNREADABLE}") from None


def _check_columns(file: Path, kind: str, there: list[str], wanted: Iterable[str]) -> None:
    for name in wanted:
        if (times := there.count(name)) != 1:
            lack = f"there is no column {name}" if not times else f"there is more than one column {name}"
            raise EvidenceError(f"{file}: {lack}, so this is no {kind} of verl-fp16. {_NAME_ONE}")


def _cast(file: Path, column: pyarrow.ChunkedArray, field: pyarrow.Field) -> pyarrow.ChunkedArray:
    import pyarrow as pa

    try:
        column = column.cast(field.type)
    except pa.ArrowException:
        raise EvidenceError(f"{file}: column {field.name} is {column.type}, not {field.type}. {_NAME_ONE}") from None
    if not column.null_count or field.name == "sample_id":
        return column
    # Tables that went through pandas have null for nan.
    for is_type, value in ((pa.types.is_floating, math.nan), (pa.types.is_string, "")):
        if is_type(field.type):
            return column.fill_null(value)
    raise EvidenceError(f"{file}: column {field.name} has rows without a value. {_UNREADABLE}")


def _status(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        raise _inaccessible(path, error) from None


def _inaccessible(path: Path, error: OSError) -> EvidenceError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return EvidenceError(f"{path}: there is no such file or folder. {_NAME_ONE}")
    if isinstance(error, PermissionError):
        barred = next((folder for folder in reversed(path.absolute().parents) if not os.access(folder, os.X_OK)), path)
        return EvidenceError(
            f"{path}: there is no permission to read it. The owner can give it: "
            f"chmod -R a+rX {shlex.quote(str(barred))}"
        )
    return EvidenceError(f"{path}: it cannot be read ({error.strerror}). {_NAME_ONE}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
