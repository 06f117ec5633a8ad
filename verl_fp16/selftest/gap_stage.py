"""BF16 and FP16 on the same tokens, and how fast each samples and scores; by :mod:`verl_fp16.gap_report`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_fp16.gap_report import driver, folder, results
from verl_fp16.gap_report.errors import GapError
from verl_fp16.gap_report.prompts import write_tokens
from verl_fp16.gap_report.sides import Measurement, Rollout, parse_pairs
from verl_fp16.preflight.refusals import ModelError
from verl_fp16.rows import RowsError
from verl_fp16.selftest.run_stage import has_flash_attention

STATISTICS = ("log_prob_abs_diff_mean", "k3")
_PROMPTS, _SAMPLES = 64, 2
# Tokens of an answer: on a GPU as many as are worth timing.
_LENGTHS = {"cpu": (24, 40), "gpu": (192, 256)}
# On a GPU a pass of the small model is over in a moment.
_TIMED_S = {"cpu": 0.0, "gpu": 5.0}
_TOKENS_AT_ONCE = {"cpu": 1024, "gpu": 8192}


def run(spec: dict[str, Any], tell: Callable[[str], object]) -> dict[str, Any]:
    """Facts: ``measurements`` (each pair's statistics with intervals, and dtypes that were found), ``speeds`` (of
    each side and precision), ``device`` and ``token_loop``; or ``failed``, why there are none.

    Args:
        spec: ``output``, ``device``, ``model`` (the user's, or None), ``prompts`` (the user's file, or None).
        tell: is told what is under way.
    """
    output = Path(spec["output"])
    theirs = spec["model"] is not None
    model = Path(spec["model"]) if theirs else output / "model"
    prompts = Path(spec["prompts"] or output / "data" / "train.parquet")
    measurements = parse_pairs("bf16,fp16", same_tokens=True)
    shutil.rmtree(output / "gap", ignore_errors=True)
    try:
        work = folder.WorkFolder(output / "gap", {})
        settings = _settings(spec, theirs)
        _write_prompts(prompts, model, settings.max_tokens, work.prompts)
        shown = _Shown(tell)
        driver.run(model, work, measurements, settings, shown)
        # They are scored on the same tokens; how fast FP16 samples is seen on its own.
        driver.sample(model, work, [Rollout("fp16")], settings, shown)
        found = results.compare(results.read(work, measurements, settings.samples))
    except (GapError, ModelError, RowsError) as error:
        return {"failed": str(error)}
    return {
        "device": spec["device"],
        "token_loop": loops_over_tokens(),
        "measurements": {
            one.name: {
                **{name: vars(found.intervals[one.name][name]) for name in STATISTICS},
                "tokens": int(one.statistics["tokens"]),
                "found": one.found,
            }
            for one in found.measured
        },
        "speeds": _speeds(work, measurements),
    }


def _settings(spec: dict[str, Any], theirs: bool) -> driver.Settings:
    device = spec["device"]
    lengths = _LENGTHS[device]
    # vLLM starts four times: compiling would take longer than all that is done with the model.
    rollout = {"gpu_memory_utilization": 0.8 if theirs else 0.3, "enforce_eager": True}
    training: dict[str, Any] = {"tokens_at_once": _TOKENS_AT_ONCE[device]}
    if device == "gpu" and not has_flash_attention():
        training |= {"attention": "sdpa", "remove_padding": False}
    timed_s = _TIMED_S[device]
    return driver.Settings(_SAMPLES, lengths[1], lengths, seed=0, rollout=rollout, training=training, timed_s=timed_s)


def loops_over_tokens() -> bool:
    """Whether verl takes log-probabilities of half-precision logits token by token in Python.

    It does without flash-attn's cross entropy (verl's ``logprobs_from_logits``), and then their time is that of the
    loop, whatever the precision.
    """
    return not has_flash_attention() or os.environ.get("VERL_DISABLE_FLASH_ATTN_CE") == "1"


def _write_prompts(file: Path, model: Path, answer: int, target: Path) -> None:
    from verl_fp16.prompt_tokens import context_of, load_config, load_tokenizer

    context = context_of(load_config(model))
    # Scoring them, vLLM samples one token beside.
    room = None if context is None else context - answer - 1
    write_tokens(file, _PROMPTS, load_tokenizer(model), room, target)


def _speeds(work: folder.WorkFolder, measurements: list[Measurement]) -> dict[str, dict[str, Any]]:
    """Side -> precision -> ``tokens`` and ``seconds``; of what was measured."""
    tokens = measurements[0].tokens.slug
    places = {
        "rollout": {one.name: work.tokens(one.name) for one in measurements},
        "training": {one.name: work.scores("training", one.training.slug, tokens) for one in measurements},
    }
    return {
        side: {name: speed for name, place in named.items() if (speed := driver.speed(place)) is not None}
        for side, named in places.items()
    }


class _Shown:
    """Tells a stage's progress now and then."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell, self._told = tell, ""

    def __call__(self, what: str, done: int, of: int) -> None:
        text = f"{what}, {done * 10 // max(1, of) * 10}%"
        if text != self._told:
            self._told = text
            self._tell(text)
