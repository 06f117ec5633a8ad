"""The first module, in order of execution, whose output is not finite in a forward pass. Pure torch."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from verl_fp16.attribution import PIECE, count_non_finite
from verl_fp16.module_names import class_in_model, is_wrapper, name_in_model


@dataclass(frozen=True)
class NonFiniteOutput:
    """The output of one call of one module, on this rank.

    Attributes:
        module: the name in the model itself, or "(the model)".
        kind: the name of its class.
        infinite: elements of the output that are inf or -inf.
        nan: elements of the output that are NaN.
        elements: elements of the output.
        largest_input: the largest finite magnitude among the floating inputs; 0.0 without.
        non_finite_inputs: elements of the floating inputs that were not finite. Above 0, with this the first module,
            the fault lies in code that is no module: the parent's, between its last submodule and this one.
    """

    module: str
    kind: str
    infinite: int
    nan: int
    elements: int
    largest_input: float
    non_finite_inputs: int


@dataclass(frozen=True)
class _Call:
    """One call: ``statistics`` is float64 of shape (4,), infinite, nan, non-finite inputs, largest input."""

    module: str
    kind: str
    elements: int
    statistics: torch.Tensor


class ModuleTrace:
    """Notes for every call of every submodule whether its output is finite; reads nothing from the device meanwhile.

    As a context manager or with :meth:`start` and :meth:`stop`, around one or more forward passes and, if wanted, their
    backward passes. Works on a plain module and under FSDP1, FSDP2 and activation checkpointing: what is computed again
    in a backward pass is not looked at. Results are those without the trace. For each call a tensor of 32 bytes is kept
    on the device of its output until the next :meth:`start`; outputs are not.

    Inputs are looked at when the module has finished: one that works in place shows what it made of them. A mask with
    -inf, or with the most negative number, counts as any other input or output does.

    Args:
        module: the model, wrapped or not.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._handles: list[Any] = []
        self._calls: list[_Call] = []

    def __enter__(self) -> ModuleTrace:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Forget the calls noted before and note those from now on.

        Raises:
            RuntimeError: started before and not stopped.
        """
        if self._handles:
            raise RuntimeError("this trace has been started already")
        self._calls.clear()
        for name, module in self._module.named_modules():
            if not is_wrapper(module):
                note = partial(self._note, name_in_model(name) or "(the model)", class_in_model(module))
                self._handles.append(module.register_forward_hook(note, with_kwargs=True))

    def stop(self) -> None:
        """Take the hooks out again and keep the notes. Does nothing where the trace is not running."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def first_non_finite(self) -> NonFiniteOutput | None:
        """The call that was the first to finish with a non-finite output: of nested modules, the innermost.

        One read from each device that outputs were on.
        """
        by_device: dict[torch.device, list[int]] = defaultdict(list)
        for number, call in enumerate(self._calls):
            by_device[call.statistics.device].append(number)
        rows: dict[int, list[float]] = {}
        for numbers in by_device.values():
            read = torch.stack([self._calls[number].statistics for number in numbers]).tolist()
            rows.update(zip(numbers, read, strict=True))
        for number, call in enumerate(self._calls):
            infinite, nan, non_finite_inputs, largest_input = rows[number]
            if infinite or nan:
                return NonFiniteOutput(
                    module=call.module,
                    kind=call.kind,
                    infinite=int(infinite),
                    nan=int(nan),
                    elements=call.elements,
                    largest_input=largest_input,
                    non_finite_inputs=int(non_finite_inputs),
                )
        return None

    @torch.no_grad()
    def _note(self, name: str, kind: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        # Inside a backward pass a forward is a recomputation: its values are those of a call that is noted already.
        if torch._C._current_graph_task_id() != -1:
            return
        inputs = floating_tensors((args, kwargs))
        for device, tensors in floating_tensors(output).items():
            counts = torch.stack([count_non_finite(tensor) for tensor in tensors]).sum(0).double()
            statistics = torch.cat([counts, _input_statistics(inputs.get(device, []), device)])
            self._calls.append(_Call(name, kind, sum(tensor.numel() for tensor in tensors), statistics))


def _input_statistics(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Non-finite elements and the largest finite magnitude: float64 of shape (2,), zeros without ``tensors``."""
    non_finite = torch.zeros((), dtype=torch.float64, device=device)
    largest = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        for piece in tensor.reshape(-1).split(PIECE):
            magnitude = piece.abs()
            bad = ~(magnitude < torch.inf)
            non_finite = non_finite + bad.sum()
            largest = torch.maximum(largest, magnitude.masked_fill_(bad, 0).amax().double())
    return torch.stack([non_finite, largest])


def floating_tensors(value: Any) -> dict[torch.device, list[torch.Tensor]]:
    """The floating tensors in ``value`` that have elements, each once, by device; of a DTensor the local shard."""
    found: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    seen: set[int] = set()
    for tensor in _tensors(value):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local = local.values() if local.is_nested else local
        if local.is_floating_point() and local.numel():
            found[local.device].append(local)
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name, None))
