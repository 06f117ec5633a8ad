"""What ``verl-fp16 preflight`` prints of a model's weights."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from verl_fp16.cli.output import is_terminal, print_table
from verl_fp16.cli.progress import in_words

if TYPE_CHECKING:
    from verl_fp16.preflight.shards import Model
    from verl_fp16.preflight.verdict import Verdict
    from verl_fp16.preflight.weights import TensorReport
    from verl_fp16.weight_cast import CastCounts

WORST = 20
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
_DISPENSABLE = ("shape", "BF16 error", "stored", "subnormal", "to zero")  # the first to go where it is narrow


def as_json(model: Model, reports: list[TensorReport], verdict: Verdict) -> dict[str, Any]:
    """What was found, for ``json.dumps``."""
    return {
        "verdict": verdict.verdict,
        "reasons": [dataclasses.asdict(reason) for reason in verdict.reasons],
        "notes": model.notes,
        "model": str(model.path),
        "model_type": model.model_type,
        "total": dataclasses.asdict(_total(reports)),
        "tensors": [dataclasses.asdict(report) for report in reports],
        "skipped": [{"name": tensor.name, "shape": tensor.shape, "dtype": tensor.dtype} for tensor in model.skipped],
    }


def _total(reports: list[TensorReport]) -> CastCounts:
    from verl_fp16.weight_cast import CastCounts

    return sum((report.counts for report in reports), CastCounts())


def show(model: Model, reports: list[TensorReport], every: bool, seconds: float) -> None:
    """Print the table of the tensors, the worst first, and what is to be said of it."""
    from verl_fp16.preflight.verdict import by_severity

    shown = by_severity(reports)[: None if every else WORST]
    columns, rows = fitting([_cells(report) for report in shown], _DISPENSABLE)
    print_table(columns, rows, header=True)
    total = _total(reports)
    rest = f"; shown are the {len(shown)} worst, --all shows every one" if len(shown) < len(reports) else ""
    tensors = "1 tensor" if len(reports) == 1 else f"{len(reports):,} tensors"
    typer.echo(f"{tensors}, {total.values:,} weights, {in_words(model.size)} in {seconds:.1f} s{rest}")
    typer.echo(
        f"in FP16 {total.overflow:,} overflow, {total.non_finite:,} were inf or nan before, "
        f"{_part(total.flushed, total)} become zero, {_part(total.subnormal, total)} subnormal; "
        f"largest |w| {total.max_abs:.4g}"
    )
    if left_out := [name for name in _cells(shown[0]) if name not in columns]:
        typer.echo(f"left out, being zero or for want of room: {' | '.join(left_out)}; --json has everything")
    typer.echo("errors are of rounding, relative to the weights, root mean square; none where that dtype is stored")
    if model.skipped:
        named = ", ".join(f"{tensor.name} ({tensor.dtype})" for tensor in model.skipped[:5])
        more = f" and {len(model.skipped) - 5} more" if len(model.skipped) > 5 else ""
        typer.echo(f"skipped, being no weights: {named}{more}")


def _cells(report: TensorReport) -> dict[str, str]:
    counts = report.counts
    errors = {"FP16 error": ("float16", report.fp16_error), "BF16 error": ("bfloat16", report.bf16_error)}
    return {
        "tensor": report.name,
        "shape": "x".join(map(str, report.shape)) or "scalar",
        "stored": _SHORT[report.dtype],
        "max |w|": f"{counts.max_abs:.4g}",
        "overflow": f"{counts.overflow:,}",
        "inf, nan": f"{counts.non_finite:,}",
        "to zero": _share(counts.flushed, counts.values),
        "subnormal": _share(counts.subnormal, counts.values),
        # What is stored in a dtype has no error in it.
        **{name: "stored" if report.dtype == dtype else _error(value) for name, (dtype, value) in errors.items()},
    }


def fitting(rows: list[dict[str, str]], dispensable: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The rows for :func:`print_table`; a terminal gets no column of zeros, and none that it has no room for, of which
    the ``dispensable`` ones go in their order."""
    names = list(rows[0])
    if is_terminal(sys.stdout):
        names = [name for name in names if any(row[name] != "0" for row in rows)]
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) + 3 for name in names}
        for name in dispensable:
            if name in names and sum(widths[other] for other in names) >= shutil.get_terminal_size().columns:
                names.remove(name)
    return names, [[row[name] for name in names] for row in rows]


def _error(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2g}" if part else "0"


def _part(part: int, total: CastCounts) -> str:
    return f"{part:,} ({part / total.values:.2g})" if part else "0"
