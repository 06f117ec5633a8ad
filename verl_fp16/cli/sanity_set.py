"""``verl-fp16 sanity-set``: the questions that a model answers right sometimes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verl_fp16.cli.output import fail, require_folder
from verl_fp16.cli.progress import output_goes_to, stages_shown

if TYPE_CHECKING:
    from verl_fp16.sanity_set.progress import Progress
    from verl_fp16.sanity_set.questions import Question
    from verl_fp16.sanity_set.reward import Reward

INTERRUPTED = 130
PROGRESS, LOG = "progress.jsonl", "vllm.log"
# Answers of a question have the seeds that follow its own.
_SEEDS_OF_A_QUESTION = 2**12


def register(app: typer.Typer) -> None:
    app.command("sanity-set")(sanity_set)


def sanity_set(
    model: Annotated[Path, typer.Argument(metavar="MODEL", readable=False, help="A Hugging Face model folder.")],
    data: Annotated[Path, typer.Option("--data", help="verl's Parquet, or JSON lines with the same fields.")],
    reward: Annotated[str, typer.Option("--reward", help="The reward function, as FILE.py:FUNC, or verl: its own.")],
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
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many questions; all without it.")
    ] = None,
    skip_long: Annotated[bool, typer.Option("--skip-long", help="Pass over questions that are too long.")] = False,
    precision: Annotated[str, typer.Option("--precision", help="fp16, bf16 or fp32, of vLLM.")] = "fp16",
    gpu_memory_utilization: Annotated[float, typer.Option("--gpu-memory-utilization", min=0.0, max=1.0)] = 0.9,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", min=1)] = 1,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever is in the folder.")] = False,
) -> None:
    """Make the paper's sanity test: the questions that a model answers right in 20% to 80% of its answers.

    Interrupt it at any time: the same command goes on where it was.

    Example: verl-fp16 sanity-set ~/models/Qwen3-0.6B --data train.parquet --reward reward.py:compute_score
    """
    from verl_fp16.preflight.refusals import ModelError
    from verl_fp16.rows import RowsError
    from verl_fp16.sampling import SamplingError
    from verl_fp16.sanity_set.errors import SanitySetError

    sampled = {
        "answers": answers,
        "correct_from": correct_from,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "precision": precision,
    }
    engine = {"gpu_memory_utilization": gpu_memory_utilization, "tensor_parallel_size": tensor_parallel_size}
    require_folder(output)
    try:
        _make(model, data, reward, output, (low, high), limit, skip_long, restart, sampled, engine)
    except (ModelError, RowsError, SamplingError, SanitySetError) as error:
        raise fail(error) from None
    except OSError as error:
        where = error.filename or output
        raise fail(f"{where}: {error.strerror or error}; what was counted so far is kept") from None
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
    from verl_fp16.leftovers import shared_memory_given_back
    from verl_fp16.made_of import digest, digest_of_model
    from verl_fp16.preflight.shards import open_model
    from verl_fp16.sampling import DTYPES
    from verl_fp16.sanity_set import progress, questions, selection
    from verl_fp16.sanity_set.errors import SanitySetError
    from verl_fp16.sanity_set.reward import load_reward

    bounds = selection.Bounds(*share)
    reward = load_reward(named_reward)
    if sampled["precision"] not in DTYPES:
        raise SanitySetError(f"--precision {sampled['precision']}: it has to be {', '.join(DTYPES)}")
    if sampled["temperature"] <= 0:
        raise SanitySetError("--temperature 0 makes all answers of a question the same. Set it above 0, as 1")
    if sampled["top_p"] <= 0:
        raise SanitySetError("--top-p 0 leaves no token to sample. Set it above 0, as 1")
    model = open_model(model).path
    # The whole file is looked through before anything is loaded: a row that is wrong costs no hour of sampling.
    total = 0
    for question in questions.read(data):
        if limit is None or total < limit:
            reward.check(question)
            total += 1
    file = output / PROGRESS
    if restart:
        file.unlink(missing_ok=True)
    made_of = {
        "model": digest_of_model(model),
        "data": digest(data),
        "reward": reward.identity,
        **sampled,
        "tensor_parallel_size": engine["tensor_parallel_size"],  # its sums are of other parts
    }
    kept = progress.Progress(file, made_of)
    try:
        if sum(row < total for row in kept.counted) < total:
            with shared_memory_given_back():
                _count(model, data, reward, kept, total, skip_long, sampled, engine)
    finally:
        kept.close()
    counted = {row: found for row, found in kept.counted.items() if row < total}
    summary = selection.summarise(
        counted.values(), bounds, {**sampled, "model": str(model), "data": str(data), "reward": named_reward}
    )
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

    from verl_fp16.prompt_tokens import context_of, load_config, load_tokenizer
    from verl_fp16.sampling import DTYPES, Sampler
    from verl_fp16.sanity_set import questions
    from verl_fp16.sanity_set.progress import Counted

    names = ("answers", "max_tokens", "temperature", "top_p")
    dtype = DTYPES[sampled["precision"]]
    context = context_of(load_config(model))
    room = None if context is None else context - sampled["max_tokens"]

    def prompts() -> Iterator[tuple[Question, list[int]]]:
        rows = (question for question in islice(questions.read(data), total) if question.row not in kept.counted)
        return _that_fit(rows, data, tokenizer, room, skip_long)

    right = seen = 0
    with output_goes_to(kept.file.with_name(LOG)) as stderr, stages_shown("questions", stderr) as tell:
        tokenizer = load_tokenizer(model)
        # All of them before vLLM is loaded: one that is too long costs no hour of sampling. And for the model's own
        # length vLLM may have no room.
        longest = 0
        for question, tokens in prompts():
            longest = max(longest, len(tokens))
            tell("measuring prompts", question.row + 1, total)
        if not longest:
            return
        tell("sampling", len(kept.counted), total)
        settings = {**{name: sampled[name] for name in names}, **engine}
        sampler = Sampler(model, dtype=dtype, max_model_len=longest + sampled["max_tokens"], **settings)
        tell("sampling", len(kept.counted), total)
        for request, found in sampler.sample(_requests(prompts(), sampled["seed"])):
            question = request.key
            correct = sum(reward(question, answer.text) >= sampled["correct_from"] for answer in found)
            kept.add(Counted(question.row, len(found), correct, sum(answer.cut for answer in found)))
            right, seen = right + correct, seen + len(found)
            tell("sampling", len(kept.counted), total, f"{right / seen:.0%} right")


def _that_fit(
    rows: Iterator[Question], data: Path, tokenizer: Any, room: int | None, skip_long: bool
) -> Iterator[tuple[Question, list[int]]]:
    """Each question with the tokens of its prompt; ``room`` is for so many of them beside the answer."""
    from verl_fp16.prompt_tokens import tokens_of
    from verl_fp16.rows import Prompt
    from verl_fp16.sanity_set.errors import SanitySetError

    for question in rows:
        tokens = tokens_of(Prompt(question.row, question.messages), data, tokenizer)
        if room is None or len(tokens) <= room:
            yield question, tokens
        elif not skip_long:
            raise SanitySetError(
                f"{data}, row {question.row}: the prompt has {len(tokens):,} tokens, and beside its answer the model "
                f"has room for {room:,}. Set a shorter --max-tokens, or pass over such rows with --skip-long"
            )


def _requests(prompts: Iterator[tuple[Question, list[int]]], seed: int) -> Iterator[Any]:
    from verl_fp16.sampling import Request

    for question, tokens in prompts:
        yield Request(question, tokens, (seed * 2**32 + question.row) * _SEEDS_OF_A_QUESTION % 2**63)


def _show(summary: dict[str, Any], parquet: Path, picture: Path, skipped: int) -> None:
    typer.echo(
        f"{summary['kept']:,} of {summary['questions']:,} questions stay, right in {summary['low']:.0%} to "
        f"{summary['high']:.0%} of their answers; {summary['below']:,} are below ({summary['never_right']:,} never "
        f"right), {summary['above']:,} above ({summary['always_right']:,} always)"
    )
    typer.echo(
        f"accuracy {summary['accuracy']:.1%}; {summary['cut_share']:.1%} of the answers were cut at the longest length"
    )
    if skipped:
        typer.echo(f"{skipped:,} questions were passed over: too long")
    typer.echo(f"data: {parquet}\npicture: {picture}")
