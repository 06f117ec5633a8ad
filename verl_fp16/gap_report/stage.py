"""One stage in a process of its own: ``python -m verl_fp16.gap_report.stage SPEC.json FD``.

vLLM and FSDP each want a process for themselves, and one whose memory is given back. Progress goes to the file
descriptor FD, a JSON object a line: ``done`` and ``of`` in sequences; ``found`` once, what the live objects say of
their dtypes; or ``failed``, a line for the user, and ``look``, whether the log says more of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from verl_fp16.gap_report import folder
from verl_fp16.gap_report.errors import GapError
from verl_fp16.gap_report.timing import Forwards, Passes
from verl_fp16.sampling import DTYPES, Request

Tell = Callable[..., None]
FAILED = 2
_SEQUENCES_OF_A_PART = 256
_TOKENS_OF_A_PART = 2**18
_SECONDS_OF_A_PART = 60.0
# Of the requests that are not timed. They are too short for vLLM's cache of prefixes, which would change other answers.
_WARM_PROMPT, _WARM_TOKENS = [5], 8


def main() -> int:
    spec, descriptor = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2])
    os.set_inheritable(descriptor, False)
    signal.signal(signal.SIGTERM, _end)

    def tell(**what: Any) -> None:
        os.write(descriptor, json.dumps(what).encode() + b"\n")

    from verl_fp16.sampling import SamplingError

    try:
        STAGES[spec.pop("stage")](tell, **spec)
    except (GapError, SamplingError) as error:
        tell(failed=str(error), look=isinstance(error, SamplingError))
        return FAILED
    return 0


def _end(number: int, frame: Any) -> None:
    """As an exception, so that what is in memory is written."""
    raise SystemExit(128 + number)


def sample(
    tell: Tell,
    *,
    model: str,
    work: str,
    side: dict[str, Any],
    slug: str,
    samples: int,
    total: int,
    max_tokens: int,
    lengths: list[int] | None,
    seed: int,
    engine: dict[str, Any],
    timed_s: float | None = None,
) -> None:
    """Answers of every prompt, with the log-probabilities that they were sampled with.

    Args:
        timed_s: seconds to sample for, at least, to tell the speed; not told without it. A batch of short answers comes
            first, and what is sampled beyond the answers is thrown away.
    """
    from verl_fp16.sampling import Sampler

    target = Path(work) / "tokens" / slug
    done = set(folder.samples(target))
    tell(done=len(done), of=total)
    sampler = Sampler(
        _rounded(Path(model), side["weights"], Path(work)),
        dtype=DTYPES[side["precision"]],
        max_tokens=max_tokens,
        temperature=side["temperature"],
        top_p=side["top_p"],
        log_probs=True,
        raw_log_probs=side["raw"],
        **engine,
    )
    tell(found=sorted(sampler.weight_dtypes()), done=len(done), of=total)

    def rows() -> Iterator[Request]:
        return _requests(Path(work) / folder.PROMPTS, sampler, samples, done, lengths, seed)

    if timed_s is not None:
        # The first requests of an engine compile, allocate and choose kernels, which are those of a batch's size.
        warm = (Request(-1 - n, _WARM_PROMPT, seed + n, min(_WARM_TOKENS, max_tokens)) for n in range(total))
        for _ in sampler.sample(warm):
            pass
    began = time.monotonic()
    for number, _ in enumerate(keep_samples(sampler, rows(), target), len(done) + 1):
        tell(done=number, of=total)
    if timed_s is not None:
        passes = Passes(timed_s)
        passes.add(_tokens(target, done), time.monotonic() - began)
        while not passes.enough:
            passes.add(*_sampled(sampler, rows()))
        tell(speed=passes.found())


def _sampled(sampler: Any, rows: Iterable[Request]) -> tuple[int, float]:
    """Tokens and seconds of answers that are thrown away."""
    began = time.monotonic()
    tokens = sum(len(answer.tokens) for _, answers in sampler.sample(rows) for answer in answers)
    return tokens, time.monotonic() - began


def _tokens(target: Path, before: set[int]) -> int:
    """Of the answers that were not there before."""
    return sum(
        len(answer)
        for file in folder.parts(target)
        for number, answer in zip(*(folder.read_part(file)[name] for name in ("sample", "answer")), strict=True)
        if number not in before
    )


def keep_samples(sampler: Any, rows: Iterable[Request], target: Path) -> Iterator[None]:
    """Write one answer of each request to ``target``, in parts, the last one however it ends; yields after each."""
    columns = _Columns(target, folder.tokens_schema())
    try:
        for request, (answer,) in sampler.sample(rows):
            columns.add(
                len(answer.tokens),
                sample=request.key,
                prompt=list(request.tokens),
                answer=answer.tokens,
                log_mu=answer.log_probs,
                cut=answer.cut and request.length is None,  # an answer whose length was given is whole
            )
            yield
    finally:
        columns.flush()


def _requests(
    prompts: Path, sampler: Any, samples: int, done: set[int], lengths: list[int] | None, seed: int
) -> Iterator[Request]:
    import random

    for row, tokens in _prompts(prompts):
        if (room := sampler.room(tokens)) < 0:
            raise GapError(
                f"prompt {row}: its {len(tokens):,} tokens and an answer are {-room:,} tokens longer than the "
                f"{sampler.max_model_len:,} that the model takes. Set a shorter --max-tokens"
            )
        for index in range(samples):
            number = row * samples + index
            if number in done:
                continue
            chance = random.Random(f"{seed} {number}")
            length = None if lengths is None else chance.randint(*lengths)
            yield Request(number, tokens, chance.getrandbits(62), length)


def _prompts(file: Path) -> Iterator[tuple[int, list[int]]]:
    import pyarrow.parquet as pq

    row = 0
    with pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(batch_size=256):
            for tokens in batch.column("tokens").to_pylist():
                yield row, tokens
                row += 1


def score_rollout(
    tell: Tell,
    *,
    model: str,
    work: str,
    side: dict[str, Any],
    slug: str,
    tokens: str,
    total: int,
    engine: dict[str, Any],
) -> None:
    """What vLLM's prefill says of tokens that another rollout sampled."""
    from verl_fp16.sampling import Sampler, Text

    work_folder = Path(work)
    target = work_folder / "rollout" / f"{slug}@{tokens}"
    sampler = Sampler(
        _rounded(Path(model), side["weights"], work_folder),
        dtype=DTYPES[side["precision"]],
        max_tokens=1,
        **engine,
    )
    tell(found=sorted(sampler.weight_dtypes()))
    for part, name, done in _missing(tell, work_folder / "tokens" / tokens, target, total):
        rows = zip(part["sample"], part["prompt"], part["answer"], strict=True)
        texts = [Text(key, [*prompt, *answer], len(prompt)) for key, prompt, answer in rows]
        found = {}
        for number, (text, log_probs) in enumerate(sampler.score(texts), 1):
            found[text.key] = log_probs
            tell(done=done + number, of=total)
        scores = {"sample": part["sample"], "log_prob": [found[key] for key in part["sample"]]}
        folder.write_part(target / name, scores, folder.scores_schema())


def score_training(
    tell: Tell,
    *,
    model: str,
    work: str,
    side: dict[str, Any],
    slug: str,
    tokens: str,
    total: int,
    settings: dict[str, Any],
    timed_s: float | None = None,
) -> None:
    """What verl's FSDP engine says of sampled tokens: the pass that computes old log-probabilities.

    Args:
        timed_s: seconds to compute for, at least, to tell the speed; not told without it. The first forward is left
            out, and what is computed beyond the scores is thrown away.
    """
    from verl_fp16.gap_report.training_side import TrainingSide

    work_folder = Path(work)
    target = work_folder / "training" / f"{slug}@{tokens}"
    clock = Forwards()
    with TrainingSide(Path(model), DTYPES[side["precision"]], side["fp32_head"], side["temperature"], **settings) as it:
        for part, name, done in _missing(tell, work_folder / "tokens" / tokens, target, total):
            found: list[Any] = []
            for batch in _forwards(it, part, clock):
                found += batch
                tell(done=done + len(found), of=total)
            folder.write_part(target / name, {"sample": part["sample"], "log_prob": found}, folder.scores_schema())
            tell(found=it.found())
        if timed_s is not None:
            passes = Passes(timed_s)
            passes.add(clock.tokens, clock.seconds)
            while not passes.enough:
                passes.add(*_computed(it, work_folder / "tokens" / tokens))
            tell(speed=passes.found())


def _forwards(side: Any, part: dict[str, list[Any]], clock: Forwards) -> Iterator[list[Any]]:
    """The scores of each forward over a part, timed."""
    rows = list(zip(part["prompt"], part["answer"], strict=True))
    at = 0
    clock.start()
    for batch in side.log_probs(rows):
        clock.stop(sum(len(prompt) + len(answer) for prompt, answer in rows[at : at + len(batch)]))
        at += len(batch)
        yield batch
        clock.start()


def _computed(side: Any, source: Path) -> tuple[int, float]:
    """Tokens and seconds of a pass over all parts whose scores are thrown away."""
    tokens, seconds = 0, 0.0
    for file in folder.parts(source):
        part = folder.read_part(file)
        began = time.monotonic()
        for _ in side.log_probs(list(zip(part["prompt"], part["answer"], strict=True))):
            pass
        seconds += time.monotonic() - began
        tokens += sum(map(len, part["prompt"])) + sum(map(len, part["answer"]))
    return tokens, seconds


STAGES = {"sample": sample, "score_rollout": score_rollout, "score_training": score_training}


def _missing(tell: Tell, source: Path, target: Path, total: int) -> Iterator[tuple[dict[str, list[Any]], str, int]]:
    """Each part without scores, its name, and how many sequences come before it."""
    done = 0
    tell(done=done, of=total)
    for file in folder.parts(source):
        part = folder.read_part(file)
        if not (target / file.name).exists():
            yield part, file.name, done
        done += len(part["sample"])
        tell(done=done, of=total)


class _Columns:
    """Rows on their way into parts of a bounded size, each written a while after its first row at the latest."""

    def __init__(self, target: Path, schema: Any) -> None:
        self._target, self._schema = target, schema
        self._begin()

    def _begin(self) -> None:
        self._rows: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._tokens, self._began = 0, time.monotonic()

    def add(self, tokens: int, **row: Any) -> None:
        for name, value in row.items():
            self._rows[name].append(value)
        self._tokens += tokens
        full = len(self._rows["sample"]) >= _SEQUENCES_OF_A_PART or self._tokens >= _TOKENS_OF_A_PART
        if full or time.monotonic() - self._began >= _SECONDS_OF_A_PART:
            self.flush()

    def flush(self) -> None:
        rows = self._rows
        self._begin()  # before they are written: whatever interrupts that, no row is written twice
        if rows["sample"]:
            folder.write_part(folder.next_part(self._target), rows, self._schema)


def _rounded(model: Path, weights: str | None, work: Path) -> Path:
    """The model with its weights rounded to ``weights``, in a folder of its own; itself where that is None."""
    if weights is None:
        return model
    from verl_fp16.gap_report.rounding import round_weights

    return round_weights(model, DTYPES[weights], work / folder.ROUNDED / weights)


if __name__ == "__main__":
    sys.exit(main())
