"""The Parquet files, all of them or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from verl_fp16.data_sets.errors import DataSetError
from verl_fp16.whole_files import taking_its_place

if TYPE_CHECKING:
    import pyarrow as pa


def targets(folder: Path, splits: Iterable[str]) -> dict[str, Path]:
    """Split -> the file that it is written to."""
    return {split: folder / f"{split}.parquet" for split in splits}


def require_free(files: Iterable[Path], read: Iterable[Path], force: bool) -> None:
    """
    Args:
        files: that are to be written.
        read: that the data are read from; even with ``force`` none of these is overwritten.

    Raises:
        DataSetError: one of ``files`` is there, and may not be overwritten.
    """
    sources = {file.resolve() for file in read}
    there = [file for file in files if file.exists()]
    for file in there:
        if file.resolve() in sources:
            raise DataSetError(f"{file}: this is what is to be read. Name another folder with --output")
        if file.is_dir():
            raise DataSetError(f"{file}: this is a folder, and a file has to be written there")
    if there and not force:
        raise DataSetError(
            f"{' and '.join(map(str, there))}: already there. Overwrite with --force, or name another folder with "
            "--output"
        )


def write(tables: Mapping[Path, pa.Table]) -> None:
    """Write each table to its file; none of the files is replaced before all of them are written.

    Raises:
        DataSetError: one cannot be written. All files are then as they were.
    """
    import pyarrow.parquet as pq

    file = Path()
    try:
        with ExitStack() as places:
            for file, table in tables.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(table, places.enter_context(taking_its_place(file)))
    except OSError as error:
        raise DataSetError(f"{file}: it cannot be written ({error.strerror or error})") from None
