"""``verl-fp16 sanity-set``: the questions that a model answers right sometimes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verl_fp16.cli.output import fail, is_terminal

if TYPE_CHECKING:
    from verl_fp16.sampling import Sampler
    from verl_fp16.sanity_set.progress import Counted, Progress
    from verl_fp16.sanity_set.questions import Question
    from verl_fp16.sanity_set.reward import Reward

INTERRUPTED = 130
PROGRESS = "progress.jsonl"
_SECONDS_BETWEEN_LINES = 10.0
# Answers of a question have the seeds that follow its own.
_SEEDS_OF_A_QUESTION = 2**12


def register(app: typer.Typer) -> None:
    app.command("sanity-set")(sanity_set)


def sanity_set(
    model: Annotated[Path, typer.Argument(metavar="MODEL", readable=False, help="A Hugging Face model folder.")],
    data: Annotated[Path, typer.Option("--data", help="verl's Parquet, or JSON lines with the same fields.")],
    reward: Annotated[str, typer.Option("--reward", help="The reward function, as FILE.py:FUNC.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what is made.")] = Path("sanity-set"),
    answers: Annotated[int, typer.Option("--answers", min=1, max=4096, help="Answers a question.")] = 40,
    low: Annotated[float, typer.Option("--low", help="Least accuracy of a question that stays.")] = 0.2,
    high: Annotated[float, typer.Option("--high", help="Largest accuracy of a question that stays.")] = 0.8,
    correct_from: Annotated[
        float, typer.Option("--correct-from", help="An answer is right from this reward on.")
    ] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 8192,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many questions, the first ones.")] = None,
    skip_long: Annotated[bool, typer.Option("--skip-long", help="Pass over questions that are too long.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="float16, bfloat16 or float32.")] = "float16",
    gpu_memory_utilization: Annotated[float, typer.Option("--gpu-memory-utilization", min=0.0, max=1.0)] = 0.9,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", min=1)] = 1,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever is in the folder.")] = False,
) -> None:
    """Make the paper's sanity test: the questions that a model answers right in 20% to 80% of its answers.

    Interrupt it at any time: the same command goes on where it was.

    Example: verl-fp16 sanity-set ~/models/Qwen3-0.6B --data train.parquet --reward reward.py:compute_score
    """
    from verl_fp16.sampling import SamplingError
    from verl_fp16.sanity_set.errors import SanitySetError

    sampled = {
        "answers": answers,
        "correct_from": correct_from,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "dtype": dtype,
    }
    engine = {"gpu_memory_utilization": gpu_memory_utilization, "tensor_parallel_size": tensor_parallel_size}
    try:
        _make(model, data, reward, output, (low, high), limit, skip_long, restart, sampled, engine)
    except (SanitySetError, SamplingError) as error:
        raise fail(error) from None
    except KeyboardInterrupt:
        raise fail(
            f"interrupted; what was counted is in {output / PROGRESS}, and the same command goes on", INTERRUPTED
        ) from None


def _make(
    model: Path,
    data: Path,
    named_reward: str,
    output: Path,
    share: tuple[float, float],
    limit: int | None,
    skip_long: bool,
    restart: bool,
    sampled: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    from verl_fp16.sanity_set import progress, questions, selection
    from verl_fp16.sanity_set.errors import SanitySetError
    from verl_fp16.sanity_set.reward import load_reward

    bounds = selection.Bounds(*share)
    reward = load_reward(named_reward)
    if not (model / "config.json").is_file():
        raise SanitySetError(f"{model}: there is no config.json in it. Give the folder of a Hugging Face model")
    # The whole file is looked through before anything is loaded: a row that is wrong costs no hour of sampling.
    total = sum(1 for _ in questions.read(data))
    total = total if limit is None else min(total, limit)
    file = output / PROGRESS
    if restart:
        file.unlink(missing_ok=True)
    made_of = {
        "model": progress.digest_of_model(model),
        "data": progress.digest(data),
        "reward": f"{progress.digest(Path(named_reward.rpartition(':')[0]))}:{named_reward.rpartition(':')[2]}",
        **sampled,
    }
    kept = progress.Progress(file, made_of)
    try:
        missing = total - sum(row < total for row in kept.counted)
        if missing:
            _count(model, data, reward, kept, total, skip_long, sampled, engine)
    finally:
        kept.close()
    counted = {row: found for row, found in kept.counted.items() if row < total}
    summary = selection.summarise(counted.values(), bounds, {**sampled, "model": str(model), "data": str(data)})
    parquet = selection.write(data, output, counted, bounds, summary)
    _show(summary, parquet, selection.draw(summary, output / selection.PICTURE, model.name), total - len(counted))


def _count(
    model: Path,
    data: Path,
    reward: Reward,
    kept: Progress,
    total: int,
    skip_long: bool,
    sampled: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Sample and judge what is not counted yet, up to the row ``total``."""
    from itertools import islice

    from verl_fp16.sampling import Sampler
    from verl_fp16.sanity_set import questions
    from verl_fp16.sanity_set.progress import Counted

    names = ("answers", "max_tokens", "temperature", "top_p", "dtype")
    sampler = Sampler(model, **{name: sampled[name] for name in names}, **engine)
    rows = (question for question in islice(questions.read(data), total) if question.row not in kept.counted)
    with _progress(total, len(kept.counted)) as advance:
        for request, found in sampler.sample(_requests(sampler, rows, sampled["seed"], skip_long)):
            question = request.key
            right = sum(reward(question, answer.text) >= sampled["correct_from"] for answer in found)
            kept.add(Counted(question.row, len(found), right, sum(answer.cut for answer in found)))
            advance(kept.counted[question.row])


def _requests(sampler: Sampler, rows: Iterator[Question], seed: int, skip_long: bool) -> Iterator[Any]:
    from verl_fp16.sampling import Request
    from verl_fp16.sanity_set.errors import SanitySetError

    for question in rows:
        tokens = sampler.prompt(question.messages)
        if (room := sampler.room(tokens)) < 0:
            if skip_long:
                continue
            raise SanitySetError(
                f"row {question.row}: a prompt of {len(tokens):,} tokens and an answer are {-room:,} tokens longer "
                f"than the model's {sampler.max_model_len:,}. Set a shorter --max-tokens, or pass over such rows with "
                "--skip-long"
            )
        yield Request(question, tokens, (seed * 2**32 + question.row) * _SEEDS_OF_A_QUESTION % 2**63)


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[Counted], None]]:
    """A bar on a terminal; elsewhere a line every ten seconds. With the accuracy so far, and the time left."""
    if is_terminal(sys.stderr):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            "questions",
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("questions", total=total, completed=done, told="")
            yield _told(lambda number, told: bar.update(task, completed=number, told=told), done)
        return
    began, last = time.monotonic(), [0.0]

    def tell(number: int, told: str) -> None:
        now = time.monotonic()
        if now - last[0] >= _SECONDS_BETWEEN_LINES or number == total:
            last[0] = now
            left = (now - began) / max(1, number - done) * (total - number)
            typer.echo(f"{number:,} of {total:,} questions, {told}, about {_clock(left)} left", err=True)

    yield _told(tell, done)


def _told(tell: Callable[[int, str], Any], done: int) -> Callable[[Counted], None]:
    number, right, answers = done, 0, 0

    def advance(counted: Counted) -> None:
        nonlocal number, right, answers
        number, right, answers = number + 1, right + counted.correct, answers + counted.answers
        tell(number, f"{right / answers:.0%} right")

    return advance


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _show(summary: dict[str, Any], parquet: Path, picture: Path, skipped: int) -> None:
    typer.echo(
        f"{summary['kept']:,} of {summary['questions']:,} questions are right in {summary['low']:.0%} to "
        f"{summary['high']:.0%} of their answers; {summary['never_right']:,} never, {summary['always_right']:,} always"
    )
    typer.echo(
        f"accuracy {summary['accuracy']:.1%}; {summary['cut_share']:.1%} of the answers were cut at the longest length"
    )
    if skipped:
        typer.echo(f"{skipped:,} questions were passed over: too long")
    typer.echo(f"data: {parquet}\npicture: {picture}")
