"""``verl-fp16 preflight``: what FP16 would do to a model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from verl_fp16.cli import preflight_run, preflight_weights
from verl_fp16.cli.output import fail, let_go, without_effect
from verl_fp16.cli.progress import progress
from verl_fp16.preflight.refusals import CONFIG, ModelError
from verl_fp16.rows import RowsError, is_parquet

if TYPE_CHECKING:
    from verl_fp16.preflight.run import Options
    from verl_fp16.preflight.shards import Model
    from verl_fp16.preflight.verdict import Verdict
    from verl_fp16.preflight.weights import TensorReport

CANNOT_TELL, INTERRUPTED = 3, 130
_COLOURS = {"FIT": "green", "AT RISK": "yellow", "UNFIT": "red"}


class Device(str, Enum):
    """Where the model is run."""

    cpu = "cpu"
    cuda = "cuda"


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
    ctx: typer.Context,
    model: Annotated[
        # readable: typer would answer with a usage message what open_model has words for.
        Path,
        typer.Argument(metavar="MODEL", readable=False, help="A Hugging Face model folder, or a .safetensors file."),
    ],
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Read the weights; run nothing.")] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            readable=False,
            help="Run these: parquet or JSON lines with 'prompt', or text with one a line. Default: generated ones.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many prompts are run, of --prompts.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="The longest sequence that is run.")] = 512,
    cut: Annotated[bool, typer.Option("--cut", help="Cut longer prompts; without it they are an error.")] = False,
    device: Annotated[
        Device | None, typer.Option(help="Where the model is run. Default: cuda where it is there.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random tokens and of the advantages' signs.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="Show every tensor and module, not the worst alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Tell what FP16 would do to a model: exit code 0 if it is FIT, 1 if AT RISK, 2 if UNFIT.

    First its weights are read; then it is run in FP16 on prompts, forward and backward: the largest activation of each
    module, and the largest loss scale that does not overflow.

    3 means that there is no verdict, and 130 that Ctrl-C was pressed; stderr then has one line that says why, and what
    was found until then is printed.

    Memory does not grow with the model: weights are read piece by piece.

    Example: verl-fp16 preflight ~/models/Qwen3-0.6B --prompts data/train.parquet
    """
    found, message = _Found(), None
    try:
        _refuse_without_effect(ctx, weights_only, prompts)
        if prompts is not None:
            is_parquet(prompts)  # a file that is not there is told before the weights are read
        _look_at_weights(model, found)
        if weights_only:
            found.verdict = found.of_weights
        else:
            chosen = {"prompts": prompts, "limit": limit, "max_tokens": max_tokens, "cut": cut, "seed": seed}
            _look_at_run(found, {**chosen, "device": None if device is None else device.value})
        code = found.verdict.exit_code
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted; there is no verdict"
    except BaseException as error:  # noqa: BLE001
        # Whatever it is, a panic in safetensors' Rust (no Exception) included: Python ends with 1 for what is not
        # caught, and 1 is a verdict here.
        code, message = CANNOT_TELL, _what_happened(error)
    if message is not None and code != INTERRUPTED and found.of_weights and found.of_weights.verdict == "UNFIT":
        # This verdict stands, whatever the model would have done.
        found.verdict, code = found.of_weights, found.of_weights.exit_code
    printed = False
    try:
        # A reader that reads no further, as head does, has no quarrel with the verdict: it still is the exit code.
        with contextlib.suppress(BrokenPipeError):
            printed = found.of_weights is not None
            _print(found, every, as_json, message)
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted; there is no verdict"
    except BaseException as error:  # noqa: BLE001  as above
        code, message = CANNOT_TELL, f"the verdict could not be printed: {_told(error)}"
    # Where there is something on stdout, or the beginning of it, it has no room for another object.
    raise _end(code, message, as_json and not printed)


def _refuse_without_effect(ctx: typer.Context, weights_only: bool, prompts: Path | None) -> None:
    where, names = "without --prompts", ("limit", "cut")
    if weights_only:
        where, names = "beside --weights-only", ("prompts", "limit", "max_tokens", "cut", "device", "seed")
    if (weights_only or prompts is None) and (line := without_effect(ctx, names, where)):
        raise ModelError(line)


@dataclasses.dataclass
class _Found:
    """What was found so far."""

    model: Model | None = None
    reports: list[TensorReport] = dataclasses.field(default_factory=list)
    of_weights: Verdict | None = None
    seconds: float = 0.0
    run: preflight_run.Run | None = None
    notes: tuple[str, ...] = ()
    of_prompts: bool = False
    verdict: Verdict | None = None


def _look_at_weights(path: Path, found: _Found) -> None:
    try:
        from verl_fp16.guard.model import refused_in_float16
        from verl_fp16.preflight.shards import open_model, read
        from verl_fp16.preflight.tensor_files import WEIGHT_DTYPES
        from verl_fp16.preflight.verdict import judge
        from verl_fp16.preflight.weights import examine, one_thread
    except ImportError as error:
        raise ModelError(f"{error}: torch and safetensors are needed to read a model") from None

    started = time.monotonic()
    model = open_model(path)
    reports = []
    with one_thread(), progress("reading", model.size, size=True) as advance:
        for tensor, pieces in read(model):
            dtype = WEIGHT_DTYPES[tensor.dtype]
            reports.append(examine(tensor.name, tensor.shape, dtype, _counted(pieces, advance)))
    verdict = judge(reports, model.model_type, refused_in_float16())
    found.model, found.reports, found.of_weights = model, reports, verdict
    found.notes, found.seconds = model.notes, time.monotonic() - started


def _look_at_run(found: _Found, chosen: dict[str, Any]) -> None:
    from verl_fp16.guard.model import refused_in_float16

    if why := _not_run(found.model, refused_in_float16()):
        found.notes += (f"nothing was run: {why}",)
        found.verdict = found.of_weights
        return
    from verl_fp16.preflight.run import Options
    from verl_fp16.preflight.run_verdict import judge_run

    found.run, found.of_prompts = _ran(found.model, Options(**chosen)), chosen["prompts"] is not None
    found.notes += found.run.notes
    found.verdict = judge_run(found.of_weights, found.run.measured)


def _not_run(model: Model, refused: frozenset[str]) -> str | None:
    if not model.path.is_dir():
        return "this is one file of weights. Name the model's folder"
    if not (model.path / CONFIG).is_file():
        return f"there is no {CONFIG}, which says what the model computes"
    if model.model_type in refused:
        return f"vLLM refuses {model.model_type} in float16"
    return None


def _ran(model: Model, options: Options) -> preflight_run.Run:
    from verl_fp16.preflight.run import prepare, run

    prepared = prepare(model, options)
    tokens = f"{prepared.sequences.tokens:,} tokens forward and backward on {prepared.model.device.type}"
    with progress("running", prepared.work, amount=tokens) as advance:
        measured, seconds = run(prepared, advance)
    return preflight_run.Run(measured, prepared.sequences, prepared.model.device.type, seconds, prepared.notes)


def _what_happened(error: BaseException) -> str:
    if isinstance(error, ModelError | RowsError):
        return str(error)
    return f"there is no verdict: {_told(error)}"


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")


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


def _counted(pieces: Iterator[Any], advance: Callable[[float], None]) -> Iterator[Any]:
    for piece in pieces:
        yield piece
        advance(piece.nbytes)


def _print(found: _Found, every: bool, as_json: bool, error: str | None) -> None:
    if found.of_weights is None:
        return
    verdict = found.verdict or found.of_weights
    if as_json:
        typer.echo(json.dumps(_as_json(found, verdict, error), indent=2))
        return
    preflight_weights.show(found.model, found.reports, every, found.seconds)
    if found.run is not None:
        typer.echo("")
        preflight_run.show(found.run, every)
        typer.secho(f"{verdict.verdict} for FP16, {_where(found)}", fg=_COLOURS[verdict.verdict], bold=True)
    elif error is None or found.verdict is not None:
        told = f"{verdict.verdict} for FP16, as far as its weights tell"
        typer.secho(told, fg=_COLOURS[verdict.verdict], bold=True)
    else:
        typer.echo(f"no verdict: the weights alone are {verdict.verdict}, and the run did not come to an end")
    for number, reason in enumerate(verdict.reasons, 1):
        typer.echo(f"{number}. {reason.verdict}: {reason.why}")
    for note in found.notes:
        typer.echo(f"note: {note}")


def _where(found: _Found) -> str:
    return "on these prompts" if found.of_prompts else "on generated tokens (--prompts FILE: on yours)"


def _as_json(found: _Found, verdict: Verdict, error: str | None) -> dict[str, Any]:
    told = {**preflight_weights.as_json(found.model, found.reports, verdict), "notes": found.notes}
    if found.run is not None:
        told |= {"weights_verdict": found.of_weights.verdict, "run": preflight_run.as_json(found.run)}
    if error is not None:
        told |= {"weights_verdict": found.of_weights.verdict, "error": error}
        told["verdict"] = found.verdict.verdict if found.verdict else None
    return told
