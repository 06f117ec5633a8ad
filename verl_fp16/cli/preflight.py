"""``verl-fp16 preflight``: what FP16 would do to a model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from verl_fp16.cli.output import fail, is_terminal, let_go, print_table
from verl_fp16.cli.progress import in_words, reading
from verl_fp16.preflight.refusals import ModelError

if TYPE_CHECKING:
    from verl_fp16.preflight.shards import Model
    from verl_fp16.preflight.verdict import Verdict
    from verl_fp16.preflight.weights import TensorReport
    from verl_fp16.weight_cast import CastCounts

CANNOT_TELL, INTERRUPTED = 3, 130
WORST = 20
_COLOURS = {"FIT": "green", "AT RISK": "yellow", "UNFIT": "red"}
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
_DISPENSABLE = ("shape", "BF16 error", "stored", "subnormal", "to zero")  # the first to go where it is narrow


# click's, or the copy of it that newer releases of typer bring along.
_UsageError = typer.BadParameter.__base__


class _Command(TyperCommand):
    """2 is a verdict here: an unknown option is no UNFIT model."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            error.exit_code = CANNOT_TELL
            raise


def register(app: typer.Typer) -> None:
    app.command("preflight", cls=_Command)(preflight)


def preflight(
    model: Annotated[
        # readable: typer would answer with a usage message what open_model has words for.
        Path,
        typer.Argument(metavar="MODEL", readable=False, help="A Hugging Face model folder, or a .safetensors file."),
    ],
    every: Annotated[bool, typer.Option("--all", help=f"Show every tensor, not the {WORST} worst.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Tell what FP16 would do to a model's weights: exit code 0 if it is FIT, 1 if AT RISK, 2 if UNFIT.

    3 means that there is no verdict, and 130 that Ctrl-C was pressed; stderr then has one line that says why.

    The files are read piece by piece; memory does not grow with the model.

    Example: verl-fp16 preflight ~/models/Qwen3-0.6B
    """
    found = message = None
    try:
        found = _examined(model)
        # A reader that reads no further, as head does, has no quarrel with the verdict: it still is the exit code.
        with contextlib.suppress(BrokenPipeError):
            _print(found, every, as_json)
        code = found.verdict.exit_code
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted; there is no verdict"
    except BaseException as error:  # noqa: BLE001
        # Whatever it is, a panic in safetensors' Rust (no Exception) included: Python ends with 1 for what is not
        # caught, and 1 is a verdict here.
        code, message = CANNOT_TELL, _what_happened(error, found)
    # Where printing a verdict failed, stdout has the beginning of another object.
    raise _end(code, message, as_json and found is None)


@dataclasses.dataclass(frozen=True)
class _Found:
    model: Model
    reports: list[TensorReport]
    verdict: Verdict
    seconds: float


def _examined(path: Path) -> _Found:
    try:
        from verl_fp16.guard.model import refused_in_float16
        from verl_fp16.preflight.shards import WEIGHT_DTYPES, open_model, read
        from verl_fp16.preflight.verdict import judge
        from verl_fp16.preflight.weights import examine, one_thread
    except ImportError as error:
        raise ModelError(f"{error}: torch and safetensors are needed to read a model") from None

    started = time.monotonic()
    model = open_model(path)
    reports = []
    with one_thread(), reading(model.size) as advance:
        for tensor, pieces in read(model):
            dtype = WEIGHT_DTYPES[tensor.dtype]
            reports.append(examine(tensor.name, tensor.shape, dtype, _counted(pieces, advance)))
    verdict = judge(reports, model.model_type, refused_in_float16())
    return _Found(model, reports, verdict, time.monotonic() - started)


def _what_happened(error: BaseException, found: _Found | None) -> str:
    if isinstance(error, ModelError):
        return str(error)
    told = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
    return f"{'the verdict could not be printed' if found else 'there is no verdict'}: {told}"


def _end(code: int, message: str | None, as_json: bool) -> typer.Exit:
    if message is not None:
        with contextlib.suppress(OSError):
            fail(message)
        with contextlib.suppress(OSError):
            if as_json:
                typer.echo(json.dumps({"verdict": None, "error": message}, indent=2))
    for stream in (sys.stdout, sys.stderr):
        let_go(stream)
    return typer.Exit(code)


def _counted(pieces: Iterator[Any], advance: Callable[[int], None]) -> Iterator[Any]:
    for piece in pieces:
        yield piece
        advance(piece.nbytes)


def _print(found: _Found, every: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(_as_json(found.model, found.reports, found.verdict))
    else:
        _show(found.model, found.reports, found.verdict, every, found.seconds)


def _as_json(model: Model, reports: list[TensorReport], verdict: Verdict) -> str:
    found = {
        "verdict": verdict.verdict,
        "reasons": [dataclasses.asdict(reason) for reason in verdict.reasons],
        "notes": model.notes,
        "model": str(model.path),
        "model_type": model.model_type,
        "total": dataclasses.asdict(_total(reports)),
        "tensors": [dataclasses.asdict(report) for report in reports],
        "skipped": [{"name": tensor.name, "shape": tensor.shape, "dtype": tensor.dtype} for tensor in model.skipped],
    }
    return json.dumps(found, indent=2)


def _total(reports: list[TensorReport]) -> CastCounts:
    from verl_fp16.weight_cast import CastCounts

    return sum((report.counts for report in reports), CastCounts())


def _show(model: Model, reports: list[TensorReport], verdict: Verdict, every: bool, seconds: float) -> None:
    from verl_fp16.preflight.verdict import by_severity

    shown = by_severity(reports)[: None if every else WORST]
    columns, rows = _columns([_cells(report) for report in shown])
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
    typer.secho(f"{verdict.verdict} for FP16, as far as its weights tell", fg=_COLOURS[verdict.verdict], bold=True)
    for number, reason in enumerate(verdict.reasons, 1):
        typer.echo(f"{number}. {reason.verdict}: {reason.why}")
    for note in model.notes:
        typer.echo(f"note: {note}")


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


def _columns(rows: list[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    """The rows for :func:`print_table`; a terminal gets no column of zeros, and none that it has no room for."""
    names = list(rows[0])
    if is_terminal(sys.stdout):
        names = [name for name in names if any(row[name] != "0" for row in rows)]
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) + 3 for name in names}
        for name in _DISPENSABLE:
            if name in names and sum(widths[other] for other in names) >= shutil.get_terminal_size().columns:
                names.remove(name)
    return names, [[row[name] for name in names] for row in rows]


def _error(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2g}" if part else "0"


def _part(part: int, total: CastCounts) -> str:
    return f"{part:,} ({part / total.values:.2g})" if part else "0"
