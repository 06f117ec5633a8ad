"""The folder of a measurement: what was asked, and parts of samples and scores, each whole or not there at all.

``measurement.json`` says what everything else was made of. ``prompts.parquet`` has the prompts' tokens;
``tokens/ROLLOUT/part-00000.parquet`` answers with the log-probabilities that they were sampled with;
``rollout/ROLLOUT@TOKENS/`` and ``training/TRAINING@TOKENS/`` what a side says of each of these parts, under its name;
``rounded/PRECISION/`` the model with weights that were rounded to it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_fp16.gap_report.errors import GapError
from verl_fp16.made_of import differences
from verl_fp16.whole_files import taking_its_place, write_whole

if TYPE_CHECKING:
    import pyarrow as pa

MADE_OF, PROMPTS = "measurement.json", "prompts.parquet"
ROUNDED = "rounded"
_OWN = (MADE_OF, PROMPTS, "tokens", "rollout", "training", ROUNDED)


class WorkFolder:
    """Where it all is.

    Args:
        path: the folder; made where it is not there.
        made_of: everything that decides the numbers; what is there of something else is refused.
        restart: whether to take away what is there.

    Raises:
        GapError: it is of another measurement, or cannot be written.
    """

    def __init__(self, path: Path, made_of: Mapping[str, Any], restart: bool = False) -> None:
        self.path = path
        file = path / MADE_OF
        try:
            path.mkdir(parents=True, exist_ok=True)
            if restart:
                self._clear()
            if file.exists():
                self._check(file, dict(made_of))
            elif any((path / name).exists() for name in _OWN):
                raise GapError(f"{path} has parts of a measurement, but no {MADE_OF}: begin anew with --restart")
            else:
                _write_made_of(file, made_of)
        except OSError as error:
            raise GapError(f"{path}: it cannot be written ({error.strerror})") from None

    def _clear(self) -> None:
        for name in _OWN:
            there = self.path / name
            if there.is_dir():
                shutil.rmtree(there)
            else:
                there.unlink(missing_ok=True)

    def _check(self, file: Path, made_of: dict[str, Any]) -> None:
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            there = None
        if not isinstance(there, dict):
            raise GapError(f"{file} is none of this command's: name another --output, or begin anew with --restart")
        told = differences(there, made_of)
        if told and not self.prompts.exists():  # they come first: nothing was made of it
            _write_made_of(file, made_of)
        elif told:
            raise GapError(
                f"{self.path} was begun with something else ({told}). Go on with what it was begun with, name another "
                "--output, or begin anew with --restart"
            )

    @property
    def prompts(self) -> Path:
        return self.path / PROMPTS

    def tokens(self, rollout: str) -> Path:
        return self.path / "tokens" / rollout

    def scores(self, side: str, name: str, tokens: str) -> Path:
        """``side``: rollout or training; of the tokens that the rollout ``tokens`` sampled."""
        return self.path / side / f"{name}@{tokens}"


def _write_made_of(file: Path, made_of: Mapping[str, Any]) -> None:
    write_whole(file, (json.dumps(dict(made_of), indent=2) + "\n").encode())


def parts(folder: Path) -> list[Path]:
    """Those that are there, in order."""
    return sorted(folder.glob("part-*.parquet"))


def next_part(folder: Path) -> Path:
    there = parts(folder)
    number = int(there[-1].stem.removeprefix("part-")) + 1 if there else 0
    return folder / f"part-{number:05d}.parquet"


def write_part(file: Path, columns: Mapping[str, Sequence[Any]], schema: pa.Schema) -> None:
    """Write a table, whole or not at all.

    Raises:
        GapError: the disk is full, or the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with taking_its_place(file) as fresh:
            pq.write_table(pa.table(dict(columns), schema=schema), fresh)
    except OSError as error:
        reason = error.strerror or error
        raise GapError(f"{file}: it cannot be written ({reason}); what was done so far is kept") from None


def tokens_schema() -> pa.Schema:
    """Of parts of ``tokens/``: a row a sequence."""
    import pyarrow as pa

    ids, numbers = pa.list_(pa.int32()), pa.list_(pa.float32())
    kinds = {"sample": pa.int64(), "prompt": ids, "answer": ids, "log_mu": numbers, "cut": pa.bool_()}
    return pa.schema(list(kinds.items()))


def scores_schema() -> pa.Schema:
    """Of parts of ``rollout/`` and ``training/``: log-probabilities of the answer's tokens, nats."""
    import pyarrow as pa

    return pa.schema([("sample", pa.int64()), ("log_prob", pa.list_(pa.float32()))])


def table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """
    Raises:
        GapError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, error) from None


def damaged(file: Path, error: Exception) -> GapError:
    told = " ".join(str(error).split())[:200]
    return GapError(f"{file}: it is damaged ({told}). Remove it: the same command makes it again")


def read_part(file: Path) -> dict[str, list[Any]]:
    return table(file).to_pydict()


def samples(folder: Path) -> Iterator[int]:
    """Numbers of the samples that are there."""
    for file in parts(folder):
        yield from table(file, ["sample"])["sample"].to_pylist()
