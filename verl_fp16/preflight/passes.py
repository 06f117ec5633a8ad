"""The passes that preflight makes through a model: forward once for each micro-batch, backward at a few loss scales.

The loss is the one of verl's actor in the first update of a step, where the ratio of new and old probability is 1:
-A log pi, the mean over the micro-batch's tokens, with advantages A of +1 and -1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from verl_fp16.preflight.activations import Gradients, Tally, Watch
from verl_fp16.preflight.loss_scale_search import LossScale, search
from verl_fp16.preflight.streamed_model import StreamedModel

MICRO_BATCH_TOKENS = 256
"""Padded tokens that are run at once, or those of the longest sequence: activations take memory too."""

_ROWS = 16  # of logits that are widened to float32 at once


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that are run at once.

    Args:
        sequences: token ids.
        advantages: one for each sequence.
    """

    sequences: tuple[tuple[int, ...], ...]
    advantages: tuple[float, ...]

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]


@dataclass
class Measured:
    """What the passes showed.

    Args:
        outputs: by module, in order of execution.
        gradients: by exponent of the loss scale, of the micro-batches for which it was tried: the first exponent, all.
        largest_outputs: by module, the largest gradient of its output without loss scale, in passes that were finite.
        largest_weights: likewise, by parameter.
        loss_scales: of each micro-batch.
    """

    outputs: dict[str, Tally]
    kinds: dict[str, str]
    culprits: list[str]
    gradients: dict[int, Gradients] = field(default_factory=dict)
    largest_outputs: dict[str, float] = field(default_factory=dict)
    largest_weights: dict[str, float] = field(default_factory=dict)
    loss_scales: list[LossScale] = field(default_factory=list)
    micro_batches: int = 0
    tokens: int = 0

    @property
    def loss_scale(self) -> LossScale | None:
        """The smallest of the micro-batches'; one that was not found is smaller than any."""
        if not self.loss_scales:
            return None
        nothing = [found for found in self.loss_scales if found.exponent is None and found.largest_at_one is None]
        some = [found for found in self.loss_scales if found.exponent is not None]
        if nothing or not some:
            return (nothing or self.loss_scales)[0]
        smallest = min(some, key=lambda found: (found.exponent, not found.verified))
        return replace(smallest, largest_at_one=max(found.largest_at_one for found in some))

    def note(self, exponent: int, seen: Gradients) -> None:
        """A backward pass of one micro-batch was made."""
        self.gradients.setdefault(exponent, Gradients(seen.scale)).merge(seen)
        if not seen.non_finite:
            for mine, others in ((self.largest_outputs, seen.outputs), (self.largest_weights, seen.weights)):
                for name, tally in others.items():
                    mine[name] = max(mine.get(name, 0.0), tally.largest / seen.scale)


def micro_batches(sequences: Sequence[Sequence[int]], seed: int) -> list[MicroBatch]:
    """Sequences of like lengths together, each batch of at most :data:`MICRO_BATCH_TOKENS` with its padding."""
    generator = torch.Generator().manual_seed(seed)
    signs = (torch.randint(0, 2, (len(sequences),), generator=generator) * 2.0 - 1).tolist()
    batches: list[list[tuple[tuple[int, ...], float]]] = []
    for sequence, sign in sorted(zip(map(tuple, sequences), signs, strict=True), key=lambda pair: len(pair[0])):
        if not batches or (len(batches[-1]) + 1) * len(sequence) > MICRO_BATCH_TOKENS:
            batches.append([])
        batches[-1].append((sequence, sign))
    return [MicroBatch(tuple(s for s, _ in batch), tuple(a for _, a in batch)) for batch in batches]


def measure(
    model: StreamedModel,
    watch: Watch,
    batches: Sequence[MicroBatch],
    start: int,
) -> Measured:
    """Run ``batches``.

    Args:
        watch: on the model's modules.
        start: exponent of the loss scale that is tried first.
    """
    measured = Measured(watch.outputs, watch.kinds, watch.culprits)
    for batch in batches:
        with model.precision():
            _measure(model, watch, batch, start, measured)
    return measured


def _measure(model: StreamedModel, watch: Watch, batch: MicroBatch, start: int, measured: Measured) -> None:
    watch.start(batch.lengths)
    loss = _loss(model, batch)
    measured.micro_batches += 1
    measured.tokens += sum(batch.lengths)
    # No scale mends a forward pass.
    if bool(loss.isfinite()) and not any(tally.non_finite for tally in watch.outputs.values()):
        _search(model, watch, loss, start, measured)


def _search(model: StreamedModel, watch: Watch, loss: torch.Tensor, start: int, measured: Measured) -> None:
    def backward(scale: float) -> Gradients:
        seen = watch.gradients = Gradients(scale)
        try:
            (loss * scale).backward(retain_graph=True)
        finally:
            watch.gradients = None
            model.let_go()
        measured.note(math.frexp(scale)[1] - 1, seen)
        return seen

    known = measured.loss_scale
    measured.loss_scales.append(search(backward, start, None if known is None else known.exponent))


def _loss(model: StreamedModel, batch: MicroBatch) -> torch.Tensor:
    lengths, width = batch.lengths, max(batch.lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, sequence in zip(ids, batch.sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    padded: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask.long().to(model.device)}
    ids = ids.to(model.device)
    logits = model.module(input_ids=ids, use_cache=False, **padded).logits
    log_probs = _LogProbs.apply(logits, ids.roll(-1, 1))
    # The last token of a sequence is followed by none.
    weights = mask.float()
    weights[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 0
    weights = weights * torch.tensor(batch.advantages)[:, None] / weights.sum()
    # Where there is no weight, what is not finite must not become nan.
    used = weights.to(model.device)
    return -(torch.where(used == 0, torch.zeros_like(log_probs), log_probs) * used).sum()


class _LogProbs(torch.autograd.Function):
    """log softmax of float16 logits (sequences, positions, vocabulary) at ``labels``, in float32, row by row.

    The gradient of the logits is rounded to their dtype, as autograd does where it passes the widening.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        flat, chosen = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1, 1)
        found = []
        for rows, picked in zip(flat.split(_ROWS), chosen.split(_ROWS), strict=True):
            wide = rows.float()
            found.append(wide.gather(1, picked).squeeze(1) - wide.logsumexp(1))
        ctx.save_for_backward(logits, labels)
        return torch.cat(found).view_as(labels)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        logits, labels = ctx.saved_tensors
        out = torch.empty_like(logits)
        parts = (logits.reshape(-1, logits.shape[-1]), labels.reshape(-1, 1), gradient.reshape(-1, 1))
        into = out.view(-1, logits.shape[-1]).split(_ROWS)
        for rows, picked, upstream, result in zip(*(part.split(_ROWS) for part in parts), into, strict=True):
            share = -rows.float().softmax(1)
            share.scatter_add_(1, picked, torch.ones_like(picked, dtype=share.dtype))
            result.copy_(share.mul_(upstream))
        return out, None
