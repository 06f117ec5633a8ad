"""The report's files: all of them are made before the first one takes its name."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from verl_fp16.run_report import contents, markdown, page
from verl_fp16.run_report.assemble import Run
from verl_fp16.run_report.figures import as_png

PAGE, MARKDOWN = "report.html", "report.md"


def make(title: str, runs: Sequence[Run], window: int | None = None) -> dict[str, bytes]:
    """File name -> content of the page, the Markdown and its pictures.

    Args:
        window: steps of the running median; None for one that goes by the number of steps.
    """
    today = date.today().isoformat()
    groups = contents.groups(runs)
    pictures = {group: f"{re.sub(r'[^a-z]+', '-', group.lower())}.png" for group, _ in groups}
    made = {pictures[group]: as_png(group, panels, runs, window) for group, panels in groups}
    made[MARKDOWN] = markdown.render(title, today, runs, pictures, window).encode()
    made[PAGE] = page.render(title, today, runs, window).encode()
    return made


def put(folder: Path, made: Mapping[str, bytes]) -> list[Path]:
    """Write the files into ``folder``, which is made if it is not there; those of an earlier report are replaced.

    Returns:
        Their paths.

    Raises:
        OSError: they cannot be written; files of the same names are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".report-", suffix=".tmp", dir=folder))
    try:
        for name, content in made.items():
            with open(fresh / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a disk that is full is told of here, not after the old report is gone
        for name in made:
            os.replace(fresh / name, folder / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return [folder / name for name in made]
