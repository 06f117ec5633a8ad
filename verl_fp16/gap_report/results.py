"""From parts to numbers: one pass over the tokens of each measurement, with the statistics that a run logs.

``sequences.parquet`` has a row for each sequence of each measurement, ``mismatch.json`` everything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verl_fp16.gap_report import analysis, figure, folder
from verl_fp16.gap_report.analysis import Interval, Sequences
from verl_fp16.gap_report.driver import FOUND
from verl_fp16.gap_report.errors import GapError
from verl_fp16.gap_report.folder import WorkFolder
from verl_fp16.gap_report.sides import Measurement
from verl_fp16.mismatch.definitions import CUT
from verl_fp16.whole_files import taking_its_place, write_whole

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

JSON, SEQUENCES = "mismatch.json", "sequences.parquet"


@dataclass(frozen=True)
class Measured:
    """What one measurement gave.

    Args:
        name: its name.
        statistics: those of :mod:`verl_fp16.mismatch.definitions`, by their names.
        sequences: a row each, in the order of the samples.
        tokens: counts of tokens by (mu, pi) for the figure.
        found: what the live objects said of their dtypes, by side.
        cut: share of the answers that ended at the longest length, not by themselves.
        note: what a reader has to know of it.
    """

    name: str
    statistics: dict[str, float]
    sequences: Sequences
    tokens: np.ndarray
    found: dict[str, Any]
    cut: float | None
    note: str = ""


def read(work: WorkFolder, measurements: Sequence[Measurement], samples: int) -> list[Measured]:
    """Take each measurement's parts together, and write the rows of all sequences to :data:`SEQUENCES`.

    All but one part are on disk at a time.

    Args:
        samples: answers of a prompt.

    Raises:
        GapError: a part is damaged, or the file cannot be written; an earlier one of that name is as it was.
    """
    import pyarrow.parquet as pq

    file = work.path / SEQUENCES
    try:
        with taking_its_place(file) as fresh, pq.ParquetWriter(fresh, _rows_schema()) as writer:
            return [_read(work, measurement, samples, writer) for measurement in measurements]
    except OSError as error:
        raise GapError(f"{file}: it cannot be written ({error.strerror or error})") from None


def _read(work: WorkFolder, measurement: Measurement, samples: int, writer: pq.ParquetWriter) -> Measured:
    import pyarrow as pa

    from verl_fp16.mismatch.statistics import GapStatistics

    statistics, counts, rows = GapStatistics(), 0.0, []
    for part in _parts(work, measurement):
        rows.append(_rows(part, statistics))
        counts = counts + figure.token_counts(part.rollout, part.training)
    columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    order = np.argsort(columns["sample"], kind="stable")
    columns = {name: column[order] for name, column in columns.items()}
    columns["prompt"] = columns["sample"] // samples
    named = {"measurement": [measurement.name] * len(columns["sample"]), **columns}
    writer.write_table(pa.table(named, schema=writer.schema))
    sequences = Sequences(*(columns[name] for name in ("length", "log_ratio", "abs_sum", "k3_sum", "prompt")))
    kept, cut = sequences[sequences.length > 0], float(columns["cut"].mean())
    return Measured(measurement.name, statistics.scalars(), kept, counts, _found(work, measurement), cut)


def _rows_schema() -> pa.Schema:
    import pyarrow as pa

    kinds = {"measurement": pa.string(), "sample": pa.int64(), "prompt": pa.int64(), "prompt_length": pa.int64()}
    kinds |= {"cut": pa.bool_(), "length": pa.float64(), "log_ratio": pa.float64(), "abs_sum": pa.float64()}
    return pa.schema([*kinds.items(), ("k3_sum", pa.float64())])


@dataclass(frozen=True)
class _Part:
    """Sequences behind each other: ``offsets`` (sequences + 1,); log-probabilities (tokens,), float32, nats."""

    sample: np.ndarray
    prompt_length: np.ndarray
    cut: np.ndarray
    offsets: np.ndarray
    rollout: np.ndarray
    training: np.ndarray


def _parts(work: WorkFolder, measurement: Measurement) -> Iterator[_Part]:
    import pyarrow.compute as pc

    tokens = measurement.tokens.slug
    for file in folder.parts(work.tokens(tokens)):
        sampled = folder.table(file, ["sample", "prompt", "answer", "log_mu", "cut"])
        training = folder.table(work.scores("training", measurement.training.slug, tokens) / file.name)
        rollout = sampled["log_mu"]
        if measurement.scored:
            rollout = folder.table(work.scores("rollout", measurement.rollout.slug, tokens) / file.name)["log_prob"]
        lengths = pc.list_value_length(sampled["answer"]).to_numpy()
        part = _Part(
            sampled["sample"].to_numpy(),
            pc.list_value_length(sampled["prompt"]).to_numpy(),
            sampled["cut"].to_numpy(),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            pc.list_flatten(rollout).to_numpy(),
            pc.list_flatten(training["log_prob"]).to_numpy(),
        )
        if not part.offsets[-1] == len(part.rollout) == len(part.training):
            raise GapError(f"{file}: its scores are of other tokens. Begin anew with --restart")
        yield part


def _rows(part: _Part, statistics: Any) -> dict[str, np.ndarray]:
    """Add a part's tokens to ``statistics``; returns what is known of each sequence."""
    import torch

    rollout, training = (torch.tensor(side) for side in (part.rollout, part.training))
    rows = statistics.add_packed(rollout, training, torch.ones(len(rollout)), torch.from_numpy(part.offsets))
    d = part.rollout.astype(np.float64) - part.training
    d = np.where(np.isfinite(d), d, 0.0)
    cut = np.clip(d, -CUT, CUT)
    of_row = np.repeat(np.arange(len(part.sample)), np.diff(part.offsets))

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(of_row, values, minlength=len(part.sample))

    return {
        "sample": part.sample,
        "prompt_length": part.prompt_length,
        "cut": part.cut,
        "length": rows.length.numpy(),
        "log_ratio": rows.s.numpy(),
        "abs_sum": summed(np.abs(d)),
        "k3_sum": summed(np.expm1(-cut) + cut),
    }


def _found(work: WorkFolder, measurement: Measurement) -> dict[str, Any]:
    tokens = measurement.tokens.slug
    files = {
        "training": work.scores("training", measurement.training.slug, tokens),
        "rollout": work.scores("rollout", measurement.rollout.slug, tokens)
        if measurement.scored
        else work.tokens(tokens),
    }
    return {side: json.loads((file / FOUND).read_text()) for side, file in files.items() if (file / FOUND).exists()}


@dataclass(frozen=True)
class Results:
    """All of it, with intervals.

    Args:
        measured: in the order in which they were asked for.
        intervals: measurement -> statistic -> its value with an interval.
        factors: measurement -> statistic -> by how much that of the first one is larger.
    """

    measured: Sequence[Measured]
    intervals: Mapping[str, Mapping[str, Interval]]
    factors: Mapping[str, Mapping[str, Interval]]


def compare(measured: Sequence[Measured], seed: int = 0) -> Results:
    """Intervals of each measurement, and factors between the first one and the others.

    Raises:
        GapError: one of them has no sequence with a finite token.
    """
    for one in measured:
        if not len(one.sequences):
            raise GapError(
                f"{one.name}: no token has two finite log-probabilities. verl-fp16 preflight tells which module makes "
                "values that are not finite"
            )
    by_name = {one.name: one.sequences for one in measured}
    drawn = analysis.resample(by_name, seed)
    intervals = analysis.measure(by_name, drawn)
    for one in measured:
        for name, interval in intervals[one.name].items():
            if np.isnan(interval.value) and name in one.statistics:  # known of the whole, not of its sequences
                intervals[one.name][name] = Interval(one.statistics[name], np.nan, np.nan)
    return Results(measured, intervals, analysis.factors(measured[0].name, intervals, drawn))


def write(path: Path, results: Results, made_of: Mapping[str, Any]) -> Path:
    """Write :data:`JSON`; every number in it is finite or null."""
    first = results.measured[0].name
    content = {
        "made_of": dict(made_of),
        "level": analysis.LEVEL,
        "measurements": {
            one.name: {
                "sequences": len(one.sequences),
                "tokens": int(one.statistics["tokens"]),
                "cut_share": one.cut,
                "found": one.found,
                "note": one.note,
                "intervals": _plain(results.intervals[one.name]),
                "statistics": {key: _finite(value) for key, value in one.statistics.items()},
                **({} if one.name == first else {f"factors of {first} over it": _plain(results.factors[one.name])}),
            }
            for one in results.measured
        },
    }
    file = path / JSON
    try:
        write_whole(file, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise GapError(f"{file}: it cannot be written ({error.strerror})") from None
    return file


def _plain(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float | None]]:
    return {
        name: {key: _finite(value) for key, value in asdict(interval).items()} for name, interval in intervals.items()
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
