"""``python -m verl_fp16.quickstart.make FOLDER``: the small model and the sums that the CPU recipes train on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EXPERTS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Make model and data; returns the exit code (0 done, 1 the model did not learn enough, 2 wrong input)."""
    parser = argparse.ArgumentParser("verl_fp16.quickstart.make", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="becomes the recipes' quickstart_dir")
    parser.add_argument("--seed", type=int, default=1, help="of model and split (default: 1)")
    parser.add_argument("--experts", action="store_true", help="a mixture of experts, in FOLDER/model-moe")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**32:
        parser.error(f"argument --seed: must be between 0 and {2**32 - 1}, got {options.seed}")
    from verl_fp16.quickstart.base_model import BaseAccuracyError

    try:
        print(make(options.folder, options.seed, experts=EXPERTS if options.experts else 0))
    except BaseAccuracyError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"quickstart: {options.folder}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def make(folder: Path, seed: int, experts: int = 0) -> str:
    """Write ``folder/data`` and ``folder/model``, or ``folder/model-moe`` with ``experts``; returns what was made.

    Raises:
        BaseAccuracyError: the model did not come to the accuracy that a run can begin with.
        OSError: the folder cannot be written.
    """
    from transformers.utils import logging

    from verl_fp16.quickstart.base_model import BaseRecipe, train_base_model
    from verl_fp16.quickstart.task import write_parquet

    logging.disable_progress_bar()
    write_parquet(folder / "data", seed)
    model = folder / ("model-moe" if experts else "model")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("base model"), *columns, console=Console(stderr=True)) as bar:
        row = bar.add_task("", total=None)
        made = train_base_model(
            model,
            seed,
            recipe=BaseRecipe(experts=experts),
            progress=lambda step, total, loss: bar.update(row, completed=step, total=total),
        )
    return f"{model}: {made.parameters / 1e6:.1f} M parameters, right on {made.sampled_accuracy:.0%} of held-out sums"


if __name__ == "__main__":
    raise SystemExit(main())
