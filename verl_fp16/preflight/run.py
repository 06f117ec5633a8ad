"""A model's folder run in FP16 on some prompts: everything between the options of the command and the report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from verl_fp16.preflight.activations import Watch
from verl_fp16.preflight.passes import Measured, MicroBatch, measure, micro_batches
from verl_fp16.preflight.refusals import ModelError
from verl_fp16.preflight.run_verdict import default_exponent
from verl_fp16.preflight.sequences import Sequences, from_prompts, generated
from verl_fp16.preflight.shards import Model
from verl_fp16.preflight.stored_weights import StoredWeights
from verl_fp16.preflight.streamed_model import StreamedModel, build
from verl_fp16.preflight.weights import one_thread
from verl_fp16.prompt_tokens import has_tokenizer, load_tokenizer
from verl_fp16.rows import read_prompts

# Expected work of a micro-batch in units of a forward pass: itself, and for each backward pass another forward pass and
# twice that for the gradients. The first micro-batch is tried at three loss scales, the others mostly at one.
_BACKWARD, _FIRST, _OTHERS = 3.0, 1 + 3 * 3.0, 1 + 3.0
_NAMED = 3


@dataclass(frozen=True)
class Options:
    """How to run it.

    Args:
        prompts: a file for :func:`~verl_fp16.rows.read_prompts`; None to generate.
        limit: prompts that are read.
        max_tokens: of a sequence.
        cut: whether longer prompts are cut, and no error.
        device: cpu or cuda; None for cuda where it is there.
    """

    prompts: Path | None = None
    limit: int = 8
    max_tokens: int = 512
    cut: bool = False
    device: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be run."""

    model: StreamedModel
    watch: Watch
    sequences: Sequences
    batches: list[MicroBatch]
    notes: tuple[str, ...]

    @property
    def work(self) -> float:
        """Calls of modules that are expected, a call in a backward pass counted three times."""
        modules = sum(1 for _ in self.model.module.modules())
        return modules * (_FIRST + _OTHERS * (len(self.batches) - 1))


def prepare(found: Model, options: Options) -> Prepared:
    """Build the model and the tokens; nothing is computed.

    Raises:
        ModelError: the model cannot be run, or there is no such device.
        RowsError: the prompts cannot be used.
    """
    device = _device(options.device)
    folder = found.path
    # All are read before the model is built, so that a wrong file is told at once.
    prompts = None if options.prompts is None else list(read_prompts(options.prompts, options.limit))
    _quiet()
    module = build(folder)
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    if prompts is None:
        sequences = generated(tokenizer, module.config, options.max_tokens, options.seed)
    elif tokenizer is None:
        raise ModelError(
            f"{folder}: the model has no tokenizer to read {options.prompts} with. Save it into the folder, or leave "
            "out --prompts for random tokens"
        )
    else:
        sequences = from_prompts(prompts, options.prompts, tokenizer, module.config, options.max_tokens, options.cut)
    weights = StoredWeights(module, found.weights)
    notes = list(sequences.notes)
    if unused := [tensor.name for tensor in weights.unused]:
        more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
        notes.append(f"not run, being no part of transformers' model: {', '.join(unused[:_NAMED])}{more}")
    watch = Watch(module)
    model = StreamedModel(module, weights, device, watch.weight_gradient)
    return Prepared(model, watch, sequences, micro_batches(sequences.ids, options.seed), tuple(notes))


def run(prepared: Prepared, advance: Callable[[float], None]) -> tuple[Measured, float]:
    """Make the passes: what they showed, and their seconds.

    Args:
        advance: is told of work done, as :attr:`Prepared.work` counts it.
    """
    started = time.monotonic()
    prepared.watch.tick = lambda recomputed: advance(_BACKWARD if recomputed else 1.0)
    threads = one_thread() if prepared.model.device.type == "cpu" else contextlib.nullcontext()
    with threads:
        measured = measure(prepared.model, prepared.watch, prepared.batches, default_exponent())
    return measured, time.monotonic() - started


def _device(named: str | None) -> torch.device:
    cuda = torch.cuda.is_available()
    if named == "cuda" and not cuda:
        raise ModelError("--device cuda: torch finds no CUDA device here. Leave it out, or give --device cpu")
    return torch.device(named or ("cuda" if cuda else "cpu"))


def _quiet() -> None:
    """What transformers has to say would stand between the lines of the report."""
    with contextlib.suppress(ImportError):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
