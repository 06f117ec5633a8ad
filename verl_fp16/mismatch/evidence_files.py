"""Evidence on disk, the writing side: ``step_000123/`` with four tables and ``facts.json``, whole or not there at all.

``tokens.parquet`` has the worst tokens, ``sequences.parquet`` a row for each sequence that was kept,
``by_position.parquet`` and ``by_length.parquet`` the curves of the gap. Units are in each column's metadata.
``facts.json`` has ``step``, ``written`` (UTC), ``alarm`` (whether it was written on one), ``tokens_seen``,
``sequences_seen`` and ``sequences_kept`` (which ones), and what the writer gave beside: ``dtypes`` (an object),
``scalars`` (an object) and ``alarms`` (lines) are what ``verl-fp16 tokens`` knows.

pyarrow is imported when something is written. What reads it is :mod:`verl_fp16.mismatch.evidence_reading`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    import pyarrow

    from verl_fp16.mismatch.evidence import Evidence, WorstToken

TOKENS, SEQUENCES, FACTS = "tokens.parquet", "sequences.parquet", "facts.json"
BY_POSITION, BY_LENGTH = "by_position.parquet", "by_length.parquet"
ALARMS_KEPT = 5
"""Folders written on an alarm are kept up to this many times the number of the others."""

_STEP = re.compile(r"step_(\d{6,})")
_TEMPORARY = ".step_*.tmp"
_NATS = "nats"
# Whatever a tokenizer raises for an id that it does not have.
_UNDECODABLE = (LookupError, TypeError, ValueError, ArithmeticError)

# Of each column: name, Arrow type, unit or meaning.
_PLACE = (
    ("step", "int64", "training step, from 1 on"),
    ("rank", "int32", "process that saw it"),
    ("row", "int64", "sequence, counted on its rank"),
    ("sample_id", "string", "name of the sequence, null without one"),
)
_LENGTH = ("length", "int64", "tokens of the response that count")
_LOG_RATIO = "log pi - log mu"
COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    TOKENS: (
        *_PLACE,
        ("position", "int64", "tokens, in the response, from 0 on"),
        _LENGTH,
        ("token_id", "int64", "id"),
        ("text", "string", "the token alone, decoded"),
        ("before", "string", "tokens of the response before it, decoded"),
        ("after", "string", "tokens of the response after it, decoded"),
        ("before_ids", "list", "ids, the nearest last"),
        ("after_ids", "list", "ids, the nearest first"),
        ("log_mu", "double", f"{_NATS}, rollout policy"),
        ("log_pi", "double", f"{_NATS}, training policy"),
        ("log_ratio", "double", f"{_NATS}, {_LOG_RATIO}"),
    ),
    SEQUENCES: (*_PLACE, _LENGTH, ("log_ratio", "double", f"{_NATS}, sum of {_LOG_RATIO} over tokens that count")),
    BY_POSITION: (
        _PLACE[0],
        ("first", "int64", "first position of the bin, from 0 on"),
        ("last", "int64", "last position of the bin"),
        ("tokens", "int64", "tokens that count"),
        ("k1", "double", f"{_NATS}, mean log mu - log pi"),
        ("log_prob_abs_diff_mean", "double", f"{_NATS}, mean |log mu - log pi|"),
    ),
    BY_LENGTH: (
        _PLACE[0],
        ("first", "int64", "smallest length of the bin, tokens"),
        ("last", "int64", "largest length of the bin, tokens"),
        ("sequences", "int64", "sequences"),
        ("length_mean", "double", "tokens"),
        ("seq_log_ratio_mean", "double", f"{_NATS}, mean of the sequences' log-ratios"),
        ("seq_log_ratio_std", "double", f"{_NATS}, their standard deviation (divided by n)"),
    ),
}


def schema(table: str) -> pyarrow.Schema:
    """The schema of :data:`TOKENS`, :data:`SEQUENCES`, :data:`BY_POSITION` or :data:`BY_LENGTH`."""
    import pyarrow as pa

    types = {"list": pa.list_(pa.int64())}
    return pa.schema(
        [
            pa.field(name, types.get(kind) or pa.type_for_alias(kind), metadata={"unit": unit})
            for name, kind, unit in COLUMNS[table]
        ]
    )


@dataclass(frozen=True)
class StepFolder:
    """A folder of one step's evidence; ``facts`` is None where facts.json cannot be read."""

    path: Path
    step: int
    facts: dict[str, Any] | None

    @property
    def alarm(self) -> bool:
        return self.facts is not None and self.facts.get("alarm") is True

    @property
    def age(self) -> tuple[str, int]:
        """Sorts by the time of writing: a run that was resumed writes smaller steps later than greater ones."""
        return str((self.facts or {}).get("written", "")), self.step


def step_folders(folder: Path) -> list[StepFolder]:
    """Those in ``folder``, the newest last.

    Raises:
        OSError: it is not there or cannot be listed.
    """
    found = []
    for path in Path(folder).iterdir():
        if (name := _STEP.fullmatch(path.name)) and path.is_dir():
            try:
                facts = read_facts(path / FACTS)
            except (OSError, ValueError):
                facts = None
            found.append(StepFolder(path, int(name[1]), facts))
    return sorted(found, key=lambda step: step.age)


def read_facts(file: Path) -> dict[str, Any]:
    """What facts.json says.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: it is no JSON object.
    """
    facts = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(facts, dict):
        raise ValueError(f"{file} is no JSON object")
    return facts


def write(
    folder: Path,
    step: int,
    evidence: Evidence,
    *,
    decode: Callable[[list[int]], str],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    facts: Mapping[str, Any],
    keep: int,
    alarm: bool = False,
) -> Path:
    """Write the evidence of a step into a folder of its own; one process at a time may.

    It gets its name when it is complete, and takes the place of an earlier one of the same step. Then all but the
    newest ``keep`` folders are removed, those of alarms apart: of them, all but the newest ``5 * keep``.

    Args:
        folder: where the folders of steps are; made if it is not there.
        step: training step.
        evidence: what was collected.
        decode: a tokenizer's: token ids to text. An id that it refuses with an error reads ``<id 12345>``.
        curves: of :meth:`GapStatistics.curves`.
        facts: for facts.json, beside what is always in it; what is no JSON becomes text.
        keep: folders to keep, at least 1.
        alarm: whether an alarm is why it is written.

    Returns:
        The folder of the step.

    Raises:
        OSError: it cannot be written; an earlier folder of the step is as it was.
        ValueError: ``keep`` is less than 1, or ``step`` negative.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step not negative, got keep={keep}, step={step}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(_TEMPORARY):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    final = folder / f"step_{step:06d}"
    fresh = _temporary(final)
    try:
        fresh.mkdir()
        _write_into(fresh, step, evidence, decode, curves, facts, alarm)
        _put(fresh, final)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _remove_old(folder, final, keep)
    return final


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.{uuid4().hex}.tmp")


def _put(fresh: Path, final: Path) -> None:
    if not final.exists():
        fresh.rename(final)
        return
    former = _temporary(final)
    final.rename(former)  # no system call that Python has puts one folder over another
    try:
        fresh.rename(final)
    finally:
        if not final.exists():
            former.rename(final)
    shutil.rmtree(former, ignore_errors=True)


def _remove_old(folder: Path, written: Path, keep: int) -> None:
    # A folder without its facts was not written by us, or is damaged: somebody may want to look at it.
    others = [step for step in step_folders(folder) if step.facts is not None]
    for alarm, most in ((False, keep), (True, ALARMS_KEPT * keep)):
        alike = [step.path for step in others if step.alarm == alarm]
        for path in alike[: max(0, len(alike) - most)]:
            if path != written:  # the clock may have been set back
                gone = _temporary(path)
                path.rename(gone)  # a reader sees all of it or none
                shutil.rmtree(gone, ignore_errors=True)


def _write_into(
    folder: Path,
    step: int,
    evidence: Evidence,
    decode: Callable[[list[int]], str],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    facts: Mapping[str, Any],
    alarm: bool,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = {
        TOKENS: [_token(token, decode) for token in evidence.tokens],
        SEQUENCES: [{**row._asdict(), "sample_id": _name(row.sample_id)} for row in evidence.sequences],
        BY_POSITION: curves["position"],
        BY_LENGTH: curves["length"],
    }
    whole = len(evidence.sequences) == evidence.sequences_seen
    kept = "all" if whole else f"{len(evidence.sequences)}, evenly spaced rows of the batch"
    for name, rows in tables.items():
        about = {"sequences_kept": kept} if name == SEQUENCES else {}
        table = pa.Table.from_pylist([{**row, "step": step} for row in rows], schema=schema(name).with_metadata(about))
        pq.write_table(table, folder / name, write_page_checksum=True)
    everything = {
        **facts,
        "step": step,
        "written": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        "alarm": alarm,
        "tokens_seen": evidence.tokens_seen,
        "sequences_seen": evidence.sequences_seen,
        "sequences_kept": kept,
    }
    text = json.dumps(_as_json(everything), indent=2, allow_nan=False) + "\n"
    (folder / FACTS).write_text(text, encoding="utf-8")


def _token(token: WorstToken, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    return {
        **token._asdict(),
        "sample_id": _name(token.sample_id),
        "text": _text(decode, [token.token_id]),
        "before": _text(decode, token.before),
        "after": _text(decode, token.after),
        "before_ids": token.before,
        "after_ids": token.after,
        "log_ratio": token.log_ratio,
    }


def _text(decode: Callable[[list[int]], str], ids: list[int]) -> str:
    """Decoded together, or one by one where an id among them is refused."""
    if not ids:
        return ""
    try:
        return _encodable(decode(ids))
    except _UNDECODABLE:
        return f"<id {ids[0]}>" if len(ids) == 1 else "".join(_text(decode, [number]) for number in ids)


def _encodable(text: str) -> str:
    """Without halves of surrogate pairs, which no UTF-8 has: U+FFFD instead; two halves become their character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _name(sample_id: object) -> str | None:
    return None if sample_id is None else _encodable(str(sample_id))


def _as_json(value: Any) -> Any:
    """With text in place of what JSON does not have, such as nan."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_as_json(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of numpy or torch
        value = value.item()
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
