"""What a model's modules give in FP16: largest magnitudes and what is not finite, forward and backward. Pure torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from verl_fp16.module_names import class_in_model
from verl_fp16.module_trace import floating_tensors

LARGEST = 65504.0
THE_MODEL = "(the model)"
_PIECE = 2**20


@dataclass
class Tally:
    """What was seen of a module's outputs, or of their gradients.

    Args:
        values: elements.
        non_finite: of them inf or nan.
        zeros: of them zero.
        largest: the largest finite magnitude.
    """

    values: int = 0
    non_finite: int = 0
    zeros: int = 0
    largest: float = 0.0

    def add(self, tensor: torch.Tensor) -> None:
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            magnitude = piece.abs()
            finite = magnitude < torch.inf
            if not bool(finite.all()):
                self.non_finite += int((~finite).sum())
                magnitude = magnitude.masked_fill_(~finite, 0)
                self.zeros += int((magnitude == 0).logical_and_(finite).sum())
            else:
                self.zeros += magnitude.numel() - int(magnitude.count_nonzero())
            self.values += magnitude.numel()
            self.largest = max(self.largest, float(magnitude.amax()) if magnitude.numel() else 0.0)

    def merge(self, other: Tally) -> None:
        self.values += other.values
        self.non_finite += other.non_finite
        self.zeros += other.zeros
        self.largest = max(self.largest, other.largest)

    @property
    def headroom(self) -> float | None:
        """float16's largest number over the largest magnitude; None where all is zero."""
        return LARGEST / self.largest if self.largest else None

    @property
    def zero_share(self) -> float:
        return self.zeros / self.values if self.values else 0.0


@dataclass
class Gradients:
    """Of a backward pass at one loss scale: by module the gradients of its outputs, by parameter the weights'.

    What is in them is scaled.
    """

    scale: float
    outputs: dict[str, Tally] = field(default_factory=dict)
    weights: dict[str, Tally] = field(default_factory=dict)
    first_non_finite: str | None = None

    @property
    def non_finite(self) -> int:
        return sum(tally.non_finite for tally in self._all())

    @property
    def largest(self) -> float:
        return max((tally.largest for tally in self._all()), default=0.0)

    def _all(self) -> list[Tally]:
        return [*self.outputs.values(), *self.weights.values()]

    def note(self, into: dict[str, Tally], name: str, tensors: Iterator[torch.Tensor]) -> None:
        tally = into.setdefault(name, Tally())
        for tensor in tensors:
            tally.add(tensor)
        if tally.non_finite and self.first_non_finite is None:
            self.first_non_finite = name

    def merge(self, other: Gradients) -> None:
        for mine, others in ((self.outputs, other.outputs), (self.weights, other.weights)):
            for name, tally in others.items():
                mine.setdefault(name, Tally()).merge(tally)
        self.first_non_finite = self.first_non_finite or other.first_non_finite


class Watch:
    """Looks at the outputs of all modules of a model, and at their gradients.

    Args:
        model: hooks are registered on its modules.

    Attributes:
        outputs: by module, in the order in which they first finished.
        culprits: modules that gave non-finite outputs of finite inputs: the first of each forward pass.
        lengths: of the sequences in the batch that comes next. Padding is not looked at, and, of gradients, a
            sequence's last position, which has no loss; where an output's shape tells positions.
        gradients: where gradients are noted.
        tick: is called at the end of each module's call, with whether it was a recomputation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, Tally] = {}
        self.kinds: dict[str, str] = {}
        self.culprits: list[str] = []
        self.lengths: Sequence[int] = ()
        self.gradients: Gradients | None = None
        self.tick: Callable[[bool], None] = lambda recomputed: None
        self._looking_for_culprit = True
        for name, module in model.named_modules():
            self.kinds[name or THE_MODEL] = class_in_model(module)
            module.register_forward_hook(functools.partial(self._note, name or THE_MODEL), with_kwargs=True)

    def start(self, lengths: Sequence[int]) -> None:
        """A forward pass follows, of sequences of these lengths."""
        self.lengths = lengths
        self._looking_for_culprit = True

    def weight_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if self.gradients is not None:
            self.gradients.note(self.gradients.weights, name, iter((gradient,)))

    def _note(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        tensors = [tensor for found in floating_tensors(output).values() for tensor in found]
        # In a backward pass a forward is a recomputation, whose values are known.
        recomputed = torch._C._current_graph_task_id() != -1
        if not recomputed:
            tally, before = self.outputs.setdefault(name, Tally()), self.outputs[name].non_finite
            for tensor in tensors:
                for part in positions(tensor, self.lengths):
                    tally.add(part)
            if self._looking_for_culprit and tally.non_finite > before and _finite((args, kwargs)):
                self._looking_for_culprit = False
                if name not in self.culprits:
                    self.culprits.append(name)
        if torch.is_grad_enabled():
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(functools.partial(self._note_gradient, name))
        self.tick(recomputed)

    def _note_gradient(self, name: str, gradient: torch.Tensor | None) -> None:
        # autograd hands over None where an output has no part in the loss.
        if self.gradients is not None and gradient is not None:
            self.gradients.note(self.gradients.outputs, name, positions(gradient, self.lengths, last=False))


def positions(tensor: torch.Tensor, lengths: Sequence[int], last: bool = True) -> Iterator[torch.Tensor]:
    """What of a padded batch's output belongs to its sequences.

    Args:
        tensor: (sequences, positions, ...) or (sequences * positions, ...); any other is given back whole.
        last: whether a sequence's last position is included.
    """
    rows, width = len(lengths), max(lengths, default=0)
    if tensor.dim() and rows > 0 and tensor.shape[0] == rows * width and tensor.shape[:2] != (rows, width):
        tensor = tensor.reshape(rows, width, *tensor.shape[1:])
    if tensor.dim() < 2 or tuple(tensor.shape[:2]) != (rows, width):
        yield tensor
        return
    if last and all(length == width for length in lengths):
        yield tensor
        return
    for row, length in zip(tensor, lengths, strict=True):
        yield row[: length if last else length - 1]


def _finite(inputs: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for found in floating_tensors(inputs).values() for tensor in found)
