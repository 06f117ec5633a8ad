"""``verl-fp16 mismatch``: how far rollout and training disagree, in one precision and another."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verl_fp16.cli.output import fail, print_table, require_folder, without_effect
from verl_fp16.cli.progress import stages_shown

if TYPE_CHECKING:
    from verl_fp16.gap_report.results import Measured, Results
    from verl_fp16.gap_report.sides import Measurement

INTERRUPTED = 130
PICTURE, LADDER_PICTURE = "mismatch.png", "ladder.png"
_PANELS = 4
_DRAWN = (("log_prob_abs_diff_mean", "mean |log π − log μ|, nats"), ("k3", "k3, nats"))
_COLUMNS = {
    "log_prob_abs_diff_mean": "mean |d log p|",
    "k3": "k3",
    "seq_kl": "sequence KL",
    "slope_per_1k_tokens": "slope per 1K tokens",
}


def register(app: typer.Typer) -> None:
    app.command("mismatch")(mismatch)


def mismatch(
    ctx: typer.Context,
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", readable=False, help="A Hugging Face model folder.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="verl's Parquet, JSON lines with prompt, or text, one a line.")
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="fp16, bf16, fp32 or TRAINING/ROLLOUT, with commas between.")
    ] = "bf16,fp16",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 1024,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers a prompt.")] = 4,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many prompts; all without it.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="LEAST:MOST tokens of an answer, drawn evenly, past the end that it comes to."),
    ] = None,
    same_tokens: Annotated[
        bool, typer.Option("--same-tokens", help="All precisions on the tokens that the first one's rollout sampled.")
    ] = False,
    ladder: Annotated[bool, typer.Option("--ladder", help="Which cause carries how much: one row each.")] = False,
    from_run: Annotated[
        list[str] | None,
        typer.Option("--from-run", metavar="[NAME=]FOLDER", help="What a verl run has written, instead of MODEL."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what is made.")] = Path("mismatch"),
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    strategy: Annotated[str, typer.Option("--strategy", help="fsdp2 or fsdp, of the training side.")] = "fsdp2",
    attention: Annotated[
        str | None, typer.Option("--attention", help="attn_implementation of the training side; verl's without it.")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed/--padded", help="verl's use_remove_padding, of the training side.")
    ] = True,
    tokens_at_once: Annotated[
        int, typer.Option("--tokens-at-once", min=1, help="Of a forward of the training side.")
    ] = 16384,
    gpu_memory_utilization: Annotated[float, typer.Option("--gpu-memory-utilization", min=0.0, max=1.0)] = 0.9,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", min=1)] = 1,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever is in the folder.")] = False,
) -> None:
    """Sample with vLLM, score the same tokens with verl's FSDP engine, and show the gap: the paper's figure.

    Interrupt it at any time: the same command goes on where it was.

    Example: verl-fp16 mismatch ~/models/Qwen3-0.6B --prompts train.parquet --limit 64
    """
    from verl_fp16.gap_report.errors import GapError
    from verl_fp16.preflight.refusals import ModelError
    from verl_fp16.rows import RowsError
    from verl_fp16.run_report.places import RunError

    require_folder(output)
    try:
        if from_run:
            if model or prompts or ladder:
                raise GapError("--from-run takes what a run has written: leave MODEL, --prompts and --ladder out")
            _refuse_without_effect(ctx, ctx.params.keys() - {"from_run", "output", "seed"}, "beside --from-run")
            results = _of_runs(from_run, output, seed)
            title = "rollout against training, from what runs have written"
        else:
            if model is None or prompts is None:
                raise GapError("name a MODEL and --prompts FILE, or a run's folder with --from-run")
            if ladder:
                _refuse_without_effect(ctx, ("precision", "same_tokens"), "beside --ladder")
            if lengths:
                _refuse_without_effect(ctx, ("max_tokens",), "beside --lengths")
            training = {"strategy": _strategy(strategy), "attention": attention}
            training |= {"remove_padding": packed, "tokens_at_once": tokens_at_once}
            rollout = {"gpu_memory_utilization": gpu_memory_utilization, "tensor_parallel_size": tensor_parallel_size}
            what = _Asked(max_tokens, samples, limit, _lengths(lengths, max_tokens), seed, rollout, training)
            results = _of_model(model, prompts, _measurements(precision, same_tokens, ladder), output, what, restart)
            title = f"{model.name}: rollout against training"
        _show(results, output, title, ladder)
    except (GapError, ModelError, RowsError, RunError) as error:
        raise fail(error) from None
    except OSError as error:
        raise fail(f"{error.filename or output}: {error.strerror or error}; what was done so far is kept") from None
    except KeyboardInterrupt:
        raise fail(f"interrupted; what was done is in {output}, and the same command goes on", INTERRUPTED) from None


def _refuse_without_effect(ctx: typer.Context, names: Collection[str], where: str) -> None:
    from verl_fp16.gap_report.errors import GapError

    if line := without_effect(ctx, names, where):
        raise GapError(line)


class _Asked:
    """The settings that decide the numbers."""

    def __init__(
        self,
        max_tokens: int,
        samples: int,
        limit: int | None,
        lengths: tuple[int, int] | None,
        seed: int,
        rollout: dict[str, Any],
        training: dict[str, Any],
    ) -> None:
        self.max_tokens = lengths[1] if lengths else max_tokens
        self.samples, self.limit, self.lengths, self.seed = samples, limit, lengths, seed
        self.rollout, self.training = rollout, training


def _strategy(name: str) -> str:
    from verl_fp16.gap_report.errors import GapError

    if name not in ("fsdp", "fsdp2"):
        raise GapError(f"--strategy {name}: it has to be fsdp2 or fsdp")
    return name


def _lengths(text: str | None, max_tokens: int) -> tuple[int, int] | None:
    from verl_fp16.gap_report.errors import GapError

    if text is None:
        return None
    least, colon, most = text.partition(":")
    if not (colon and least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise GapError(f"--lengths {text}: it has to be LEAST:MOST, numbers of tokens, such as 100:1000")
    return int(least), int(most)


def _measurements(precision: str, same_tokens: bool, ladder: bool) -> list[Measurement]:
    from verl_fp16.gap_report import sides

    return sides.ladder() if ladder else sides.parse_pairs(precision, same_tokens)


def _of_model(
    model: Path, prompts: Path, measurements: list[Measurement], output: Path, asked: _Asked, restart: bool
) -> Results:
    from verl_fp16.gap_report import driver, folder, results
    from verl_fp16.gap_report import prompts as prompt_files
    from verl_fp16.gap_report.driver import Settings
    from verl_fp16.made_of import digest, digest_of_model
    from verl_fp16.preflight.shards import open_model
    from verl_fp16.prompt_tokens import context_of, load_config, load_tokenizer
    from verl_fp16.rows import is_parquet

    path = open_model(model).path
    is_parquet(prompts)  # that it is there is found out before anything is begun
    made_of = {
        "model": digest_of_model(path),
        "prompts": digest(prompts),
        **{name: getattr(asked, name) for name in ("limit", "samples", "max_tokens", "lengths", "seed", "training")},
        "tensor_parallel_size": asked.rollout["tensor_parallel_size"],  # its sums are of other parts
    }
    work = folder.WorkFolder(output, _as_json(made_of), restart)
    if not work.prompts.exists():
        context = context_of(load_config(path))
        # Scoring them, vLLM samples one token beside.
        room = None if context is None else context - asked.max_tokens - 1
        prompt_files.write_tokens(prompts, asked.limit, load_tokenizer(path), room, work.prompts)
    settings = Settings(asked.samples, asked.max_tokens, asked.lengths, asked.seed, asked.rollout, asked.training)
    with stages_shown("sequences") as tell:
        driver.run(path, work, measurements, settings, tell)
    found = results.compare(results.read(work, measurements, asked.samples), asked.seed)
    results.write(output, found, {"model": str(model), "prompts": str(prompts), **made_of})
    return found


def _as_json(made_of: dict[str, Any]) -> dict[str, Any]:
    import json

    return json.loads(json.dumps(made_of))


def _of_runs(named: list[str], output: Path, seed: int) -> Results:
    from verl_fp16.gap_report import from_run, results
    from verl_fp16.run_report.places import split_name

    measured: dict[str, Measured] = {}
    for text in named:
        given, path = split_name(text)
        name = given or Path(path).resolve().name
        while name in measured:
            name += "'"
        measured[name] = from_run.read(Path(path), name)
    output.mkdir(parents=True, exist_ok=True)
    found = results.compare(list(measured.values()), seed)
    results.write(output, found, {"runs": {name: text for name, text in zip(measured, named, strict=True)}})
    return found


def _show(results: Results, output: Path, title: str, ladder: bool) -> None:
    from verl_fp16.gap_report import figure

    first = results.measured[0].name
    over = f"{first} over this"
    columns = ["training/rollout", "tokens", *_COLUMNS.values(), f"{over}: |d log p|", f"{over}: k3"]
    rows = []
    for one in results.measured:
        values, factors = results.intervals[one.name], results.factors.get(one.name, {})
        row = [one.name, f"{int(one.statistics['tokens']):,}", *(figure.written(values[name]) for name in _COLUMNS)]
        rows.append([*row, *(figure.written(factors[name]) if factors else "" for name, _ in _DRAWN)])
    print_table(columns, rows, header=True)
    for one in results.measured:
        if one.note:
            typer.echo(f"{one.name}: {one.note}")
        if bad := one.statistics.get("nonfinite_training", 0) + one.statistics.get("nonfinite_rollout", 0):
            typer.echo(f"{one.name}: {int(bad):,} log-probabilities are not finite, and were left out")
        if one.cut:
            typer.echo(f"{one.name}: {one.cut:.1%} of the answers were cut at the longest length")
    typer.echo(_slopes(results))
    for line in _untold(results):
        typer.echo(line)
    panels = [
        figure.Panel(one.name, one.tokens, one.sequences, results.intervals[one.name]["slope_per_1k_tokens"])
        for one in results.measured[: 2 if ladder else _PANELS]
    ]
    pictures = [figure.draw(panels, output / PICTURE, title)]
    if ladder:
        pictures.append(figure.draw_ladder(results.intervals, _DRAWN, output / LADDER_PICTURE, title))
    typer.echo(f"numbers: {output / 'mismatch.json'}")
    for picture in pictures:
        typer.echo(f"picture: {picture}")
    if not ladder and len(panels) < len(results.measured):
        typer.echo(f"the picture has the first {len(panels)} of {len(results.measured)}; the numbers have all")


def _untold(results: Results) -> Iterator[str]:
    """What was measured on too little to tell two pairs apart."""
    first = results.measured[0]
    for one in results.measured[1:]:
        factor = results.factors[one.name]["log_prob_abs_diff_mean"]
        if 1 in factor:
            yield (
                f"{int(one.statistics['tokens']):,} tokens of {len(one.sequences):,} answers do not tell {one.name} "
                f"from {first.name} (the factor's interval contains 1): raise --limit or --samples, or set --lengths "
                "where answers are short"
            )


def _slopes(results: Results) -> str:
    """Whether the gap grows with length, pair by pair."""
    import math

    told = []
    for one in results.measured:
        slope = results.intervals[one.name]["slope_per_1k_tokens"]
        if math.isnan(slope.value):
            told.append(f"{one.name}: unknown, all answers are of one length")
        else:
            told.append(f"{one.name}: {'no slope is seen' if 0 in slope else 'yes'}")
    return f"does the log-ratio grow with length? {'; '.join(told)} (95% intervals)"
