"""``verl-fp16 data``: verl's Parquet from a data set that is on disk."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from verl_fp16.cli.output import fail, print_table, require_folder

if TYPE_CHECKING:
    from verl_fp16.data_sets.converting import Converted, Options

INTERRUPTED = 130
_SHOWN = 3


def register(app: typer.Typer) -> None:
    app.command("data")(data)


def data(
    task: Annotated[str, typer.Argument(metavar="gsm8k|math", help="Which data set it is, or is like.")],
    path: Annotated[
        Path, typer.Argument(metavar="PATH", readable=False, help="A folder or a file: Parquet, Arrow, JSON lines.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for what is made.", show_default="outputs/data/gsm8k or math"
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="train or test, where no name of a file or folder says it.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", metavar="NAME", help="Which of several configurations; several are joined."),
    ] = None,
    question_column: Annotated[str | None, typer.Option("--question-column", metavar="NAME")] = None,
    answer_column: Annotated[str | None, typer.Option("--answer-column", metavar="NAME")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many rows of a split.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows without a final answer.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Turn GSM8K or MATH, as it lies on disk, into verl's Parquet with the fields that verl's rewards read.

    Nothing is downloaded. The exit code is 0 where files were written, 2 for a wrong input, 130 after Ctrl-C.

    Example: verl-fp16 data gsm8k ~/datasets/gsm8k --config main
    """
    from verl_fp16.data_sets.converting import Options
    from verl_fp16.data_sets.errors import DataSetError

    folder = Path("outputs", "data", task) if output is None else output
    options = Options(question_column, answer_column, limit, skip_bad)
    require_folder(folder)
    try:
        made, files, notes = _make(task, path, folder, split, config or (), options, force)
    except DataSetError as error:
        raise fail(error) from None
    except OSError as error:
        raise fail(f"{error.filename or path}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        raise fail("interrupted; files that were there are as they were", INTERRUPTED) from None
    _show(made, files, notes)


def _make(
    task: str,
    path: Path,
    folder: Path,
    split: str | None,
    configs: Iterable[str],
    options: Options,
    force: bool,
) -> tuple[dict[str, Converted], dict[str, Path], list[str]]:
    from verl_fp16.data_sets.converting import convert
    from verl_fp16.data_sets.errors import DataSetError
    from verl_fp16.data_sets.places import SPLITS, find_files
    from verl_fp16.data_sets.tasks import TASKS
    from verl_fp16.data_sets.writing import require_free, targets, write

    if task not in TASKS:
        raise DataSetError(f"{task}: there is no such data set here. Known are {', '.join(TASKS)}")
    found = find_files(path, split, list(configs))
    files = targets(folder, found.splits)
    require_free(files.values(), (file for part in found.splits.values() for file in part), force)
    made = convert(TASKS[task], found.splits, options)
    write({files[split]: converted.table for split, converted in made.items()})
    others = [file for split, file in targets(folder, SPLITS).items() if split not in files and file.exists()]
    return made, files, [*found.notes, *(f"not from this data set, and as it was: {file}" for file in others)]


def _show(made: Mapping[str, Converted], files: Mapping[str, Path], notes: Iterable[str]) -> None:
    from verl_fp16.data_sets.converting import FILE_KEYS

    rows = [
        (split, f"{converted.table.num_rows:,}", f"{len(converted.left_out):,}", str(files[split]))
        for split, converted in made.items()
    ]
    print_table(("split", "rows", "left out", "file"), rows, header=True)
    for split, converted in made.items():
        for line in converted.left_out[:_SHOWN]:
            typer.echo(f"left out of {split}: {line}")
        if converted.left_out[_SHOWN:]:
            typer.echo(f"left out of {split}: {len(converted.left_out) - _SHOWN:,} more")
    for note in notes:
        typer.echo(note)
    for split, key in FILE_KEYS.items():
        if split not in made and not all(file.with_name(f"{split}.parquet").exists() for file in files.values()):
            way = f"convert another file into the same folder with --split {split}"
            typer.echo(f"no {split} split is here: verl wants {key} too; {way}")
    typer.echo("for verl: " + " ".join(_override(FILE_KEYS[split], file) for split, file in files.items()))


def _override(key: str, file: Path) -> str:
    """As a shell and Hydra take it; absolute, since Ray's workers may have another working directory."""
    value = str(file.resolve())
    if not re.fullmatch(r"[\w./-]+", value, re.ASCII):
        value = "'" + value.replace("'", "\\'") + "'"
    return shlex.quote(f"{key}={value}")
