"""Which questions stay, and what is written of them: verl's Parquet, a summary, a histogram."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_fp16.rows import is_parquet
from verl_fp16.sanity_set.errors import SanitySetError
from verl_fp16.sanity_set.progress import Counted
from verl_fp16.sanity_set.questions import records
from verl_fp16.whole_files import taking_its_place, write_whole

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET, SUMMARY, PICTURE = "train.parquet", "summary.json", "accuracy.png"
_BATCH = 256
_BINS = 20


@dataclass(frozen=True)
class Bounds:
    """A question stays where its accuracy is in [low, high].

    Raises:
        SanitySetError: they are not in order, or not shares.
    """

    low: float = 0.2
    high: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise SanitySetError(
                f"--low {self.low:g} --high {self.high:g}: shares with 0 <= low <= high <= 1 are needed, as 0.2 and 0.8"
            )

    def keep(self, counted: Counted) -> bool:
        # Not by the quotient: 8 of 40 is 0.2, and 0.2 * 40 is 8.000000000000002 for other numbers.
        return round(self.low * counted.answers, 9) <= counted.correct <= round(self.high * counted.answers, 9)


def summarise(counted: Iterable[Counted], bounds: Bounds, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary says, with the histogram: questions by accuracy, in bins of a twentieth."""
    rows = list(counted)
    answers = sum(row.answers for row in rows)
    histogram, kept = [0] * (_BINS + 1), [0] * (_BINS + 1)  # the last one: all answers right
    for row in rows:
        place = row.correct * _BINS // row.answers
        histogram[place] += 1
        kept[place] += bounds.keep(row)
    left_out = [row for row in rows if not bounds.keep(row)]
    below = sum(row.accuracy <= bounds.low for row in left_out)
    return {
        "questions": len(rows),
        "kept": sum(kept),
        "below": below,
        "above": len(left_out) - below,
        "never_right": sum(row.correct == 0 for row in rows),
        "always_right": sum(row.correct == row.answers for row in rows),
        "answers": answers,
        "accuracy": sum(row.correct for row in rows) / answers if answers else None,
        "cut_share": sum(row.cut for row in rows) / answers if answers else None,
        "low": bounds.low,
        "high": bounds.high,
        "histogram": histogram,
        "histogram_kept": kept,
        "settings": dict(settings),
    }


def write(data: Path, folder: Path, counted: Mapping[int, Counted], bounds: Bounds, summary: Mapping[str, Any]) -> Path:
    """Write the rows of ``data`` that stay, with their ``accuracy`` and the number of ``answers``, and the summary.

    Returns:
        The Parquet file. Files of the same name are replaced when the new ones are whole.

    Raises:
        SanitySetError: nothing stays, or something cannot be written.
    """
    if not summary["kept"]:
        raise SanitySetError(
            f"no question of {data} is between {bounds.low:.0%} and {bounds.high:.0%}: {summary['never_right']} of "
            f"{summary['questions']} were never right, {summary['always_right']} always. Set other --low and --high, "
            f"or give another model or other data{_left_behind(folder / PARQUET)}"
        )
    try:
        file = _write_parquet(data, folder / PARQUET, counted, bounds)
        write_whole(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    except OSError as error:
        raise SanitySetError(f"{folder}: it cannot be written ({error.strerror})") from None
    return file


def _left_behind(file: Path) -> str:
    return f". {file} is of other bounds" if file.exists() else ""


def _kept(data: Path, counted: Mapping[int, Counted], bounds: Bounds) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(records(data)):
        row = counted.get(number)
        if row is not None and bounds.keep(row):
            yield {**record, "accuracy": row.accuracy, "answers": row.answers}


def _write_parquet(data: Path, file: Path, counted: Mapping[int, Counted], bounds: Bounds) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(data) if is_parquet(data) else _schema_of(_kept(data, counted, bounds))
        for name, kind in (("accuracy", pa.float64()), ("answers", pa.int64())):
            place = schema.get_field_index(name)
            field = pa.field(name, kind)
            schema = schema.append(field) if place < 0 else schema.set(place, field)
        with taking_its_place(file) as fresh, pq.ParquetWriter(fresh, schema) as writer:
            for batch in _batches(_kept(data, counted, bounds)):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    except pa.ArrowException as error:
        raise SanitySetError(f"{data}: its rows are not of one kind ({' '.join(str(error).split())[:200]})") from None
    return file


def _schema_of(rows: Iterable[dict[str, Any]]) -> pa.Schema:
    """Of all rows: pyarrow's own is that of the columns of the first one."""
    import pyarrow as pa

    found = pa.schema([])
    for batch in _batches(rows):
        names = dict.fromkeys(name for row in batch for name in row)
        kinds = pa.schema([(name, pa.array([row.get(name) for row in batch]).type) for name in names])
        found = pa.unify_schemas([found, kinds], promote_options="permissive")
    return found


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def draw(summary: Mapping[str, Any], file: Path, title: str) -> Path:
    """A PNG of the histogram: questions by accuracy, those that stay in another colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    counts: Sequence[int] = summary["histogram"]
    left = [index / _BINS for index in range(len(counts))]
    bars = {"width": 0.9 / _BINS, "align": "edge"}
    axes.bar(left, counts, color="#b8c4cc", **bars)
    axes.bar(left, summary["histogram_kept"], color="#2a78b5", **bars)
    axes.axvspan(summary["low"], summary["high"], color="#2a78b5", alpha=0.08, lw=0)
    axes.set_xlabel(f"share of right answers, {summary['settings'].get('answers', '')} a question")
    axes.set_ylabel("questions")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.02, 1.07)
    axes.set_title(f"{title}: {summary['kept']} of {summary['questions']} questions stay", fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=150)
    return file
