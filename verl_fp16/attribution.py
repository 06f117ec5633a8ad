"""Which parameters' gradients are not finite on this rank, by their names in the model. Pure torch.

For a step that is being skipped: after unscaling, which keeps inf and NaN as they are, and before clipping, which turns
one inf into NaN everywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor

from verl_fp16.module_names import name_in_model

# Elements looked at in one go: bounds the temporary memory to a few times 32 MiB, whatever the size of a tensor.
PIECE = 2**23


@dataclass(frozen=True)
class NonFiniteGradient:
    """Non-finite elements in this rank's shard of one parameter's gradient.

    Attributes:
        parameter: the name in the model itself, without what FSDP, checkpointing and torch.compile add.
        infinite: elements that are inf or -inf.
        nan: elements that are NaN.
        elements: elements of the shard that this rank holds.
    """

    parameter: str
    infinite: int
    nan: int
    elements: int


def non_finite_gradients(module: nn.Module) -> list[NonFiniteGradient]:
    """The parameters of ``module`` of whose gradient this rank holds a non-finite element.

    Plain modules, FSDP2 and FSDP1 with either value of ``use_orig_params``. No collective is called: each rank sees its
    own shards alone. A shared parameter has the first of its names; one without a gradient is passed over. One read
    from each device that holds gradients.

    Args:
        module: the model, wrapped or not, after a backward pass that has reduced the gradients.

    Returns:
        the parameter with the most non-finite elements first; by name where they are equal.

    Raises:
        ValueError: FSDP1 holds a gradient that is not sharded yet (``no_sync``).
    """
    by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, gradient in named_local_gradients(module):
        by_device[gradient.device].append((name, gradient))
    found = []
    for shards in by_device.values():
        counts = torch.stack([count_non_finite(gradient) for _, gradient in shards]).tolist()
        found += [
            NonFiniteGradient(name_in_model(name), infinite, nan, gradient.numel())
            for (name, gradient), (infinite, nan) in zip(shards, counts, strict=True)
            if infinite or nan
        ]
    return sorted(found, key=lambda gradient: (-gradient.infinite - gradient.nan, gradient.parameter))


@torch.no_grad()
def count_non_finite(tensor: torch.Tensor) -> torch.Tensor:
    """How many elements of a floating ``tensor`` of any shape are infinite and how many NaN.

    Returns:
        int64 of shape (2,) on the device of ``tensor``; nothing is read from the device.
    """
    counts = [
        torch.stack([torch.isinf(piece).sum(), torch.isnan(piece).sum()]) for piece in tensor.reshape(-1).split(PIECE)
    ]
    return torch.stack(counts).sum(0)


def named_local_gradients(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's part of every gradient, with the parameter's name as the wrapped module has it."""
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        if isinstance(parameter, FlatParameter):
            yield from _flat_gradients(name.rpartition(".")[0], parameter)
        else:
            yield name, gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _flat_gradients(owner: str, flat: FlatParameter) -> Iterator[tuple[str, torch.Tensor]]:
    """The parts of FSDP1's flat gradient that belong to parameters: neither padding nor what other ranks hold.

    Args:
        owner: name of the module whose parameters are flattened; "" for the model.
    """
    if flat.grad.shape != flat._sharded_size:
        raise ValueError(
            f"the flat gradient of {name_in_model(owner) or 'the model'} has shape {tuple(flat.grad.shape)} and not "
            f"that of this rank's shard, {tuple(flat._sharded_size)}: gradients are not reduced yet (no_sync?)"
        )
    for name, part in zip(flat._fqns, flat._shard_param_infos, strict=True):
        if part.in_shard:
            start = part.offset_in_shard
            yield f"{owner}.{name}".lstrip("."), flat.grad[start : start + part.numel_in_shard]
