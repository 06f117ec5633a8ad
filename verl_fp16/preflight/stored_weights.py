"""A model's parameters as its shards hold them: which stored tensors make up which, and reading them in pieces."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from verl_fp16.preflight.refusals import ModelError
from verl_fp16.preflight.shards import StoredTensor
from verl_fp16.preflight.tensor_files import WEIGHT_DTYPES, fill

PIECE = 2**20
"""Elements that are held at once of what is read."""

_NAMED = 5


@dataclass
class _Recipe:
    """What a parameter is made of.

    Args:
        sources: the stored tensors, by the pattern of the conversion that they match; "" where there is none.
        conversion: transformers' ``WeightConverter``; None where a stored tensor is the parameter.
    """

    sources: dict[str, list[StoredTensor]] = field(default_factory=dict)
    conversion: Any = None

    @property
    def plain(self) -> StoredTensor | None:
        return None if self.conversion is not None else next(iter(self.sources.values()))[0]


class StoredWeights:
    """The parameters of a model, read from its shards on demand.

    Stored names become the model's by the conversions that transformers itself applies when it loads (renamings,
    experts that it stacks), where the installed release has them; otherwise they have to be the same, but for the
    prefix of the base model.

    Args:
        model: on the meta device, with its weights tied.
        weights: what the shards hold.

    Raises:
        ModelError: a parameter is not among them, or of another shape.
    """

    def __init__(self, model: nn.Module, weights: Sequence[StoredTensor]) -> None:
        self._model = model
        names = {id(tensor): [] for tensor in model.state_dict(keep_vars=True).values()}
        for name, tensor in model.state_dict(keep_vars=True).items():
            names[id(tensor)].append(name)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found, self.unused = _recipes(model, weights, shapes)
        missing = []
        self._recipes: dict[str, _Recipe] = {}
        for tied in names.values():
            recipe = next((found[name] for name in tied if name in found), None)
            if recipe is None:
                missing += tied[:1]
                continue
            self._recipes.update(dict.fromkeys(tied, recipe))
        missing = [name for name in missing if name in dict(model.named_parameters())]
        if missing:
            raise ModelError(_missing_message(missing, self.unused, weights))
        for name, recipe in self._recipes.items():
            if recipe.plain is not None and recipe.plain.shape != shapes[name]:
                raise ModelError(
                    f"{recipe.plain.file}: {recipe.plain.name} is of shape {recipe.plain.shape}, and config.json makes "
                    f"{name} one of {shapes[name]}. Download or save the model again"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._recipes

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill ``out``, contiguous and of the parameter's shape, with the parameter, rounded to its dtype."""
        recipe = self._recipes[name]
        if recipe.plain is not None:
            fill(out.view(-1), recipe.plain, PIECE)
        elif (places := _places(recipe, out.shape)) is not None:
            for source, start in places:
                fill(out.view(-1)[start : start + source.values], source, PIECE)
        else:
            out.copy_(self._converted(name, recipe, tuple(out.shape)))

    def rows(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, most: int = PIECE
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """A parameter of two dimensions as ``(rows, values)``, of at most ``most`` elements or one row."""
        recipe = self._recipes[name]
        step = max(1, most // max(1, shape[1]))
        if recipe.plain is None:
            whole = torch.empty(tuple(shape), dtype=dtype)
            self.read_into(name, whole)
            for start in range(0, shape[0], step):
                yield slice(start, min(start + step, shape[0])), whole[start : start + step]
            return
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            piece = torch.empty(stop - start, shape[1], dtype=dtype)
            fill(piece.view(-1), recipe.plain, PIECE, start * shape[1])
            yield slice(start, stop), piece

    def _converted(self, name: str, recipe: _Recipe, shape: tuple[int, ...]) -> torch.Tensor:
        conversion = copy.deepcopy(recipe.conversion)
        for pattern, sources in recipe.sources.items():
            for source in sources:
                conversion.add_tensor(name, source.name, pattern, lambda source=source: _whole(source))
        made = conversion.convert(name, model=self._model, config=self._model.config)
        value = made.get(name)
        value = value[0] if isinstance(value, list) else value
        if value is None or tuple(value.shape) != shape:
            some = next(iter(recipe.sources.values()))[0]
            raise ModelError(
                f"{some.file}: transformers makes no {name} of shape {shape} of {some.name} and its like. Save the "
                "model again with the installed transformers"
            )
        return value


def _whole(source: StoredTensor) -> torch.Tensor:
    tensor = torch.empty(source.shape, dtype=getattr(torch, WEIGHT_DTYPES[source.dtype]))
    fill(tensor.view(-1), source, PIECE)
    return tensor


def _recipes(
    model: nn.Module, weights: Sequence[StoredTensor], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, _Recipe], list[StoredTensor]]:
    """Name in the model -> what it is made of; and the stored tensors that are part of nothing."""
    rename, conversions = _transformers_names(model, shapes)
    recipes: dict[str, _Recipe] = {}
    unused = []
    # The order is that of the experts: 2 before 10.
    for stored in sorted(weights, key=lambda stored: _natural(stored.name)):
        name, pattern = rename(stored.name)
        if name not in shapes:
            unused.append(stored)
            continue
        recipe = recipes.setdefault(name, _Recipe(conversion=conversions.get(pattern)))
        recipe.sources.setdefault(pattern or "", []).append(stored)
        if recipe.conversion is not None:
            # A conversion into several parameters is known by the first of them.
            first = recipe.conversion.target_patterns[0]
            for other in recipe.conversion.target_patterns[1:]:
                recipes.setdefault(name.replace(first, other), recipe)
    return recipes, unused


def _transformers_names(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> tuple[Any, dict[str, Any]]:
    """stored name -> (name in the model, pattern of the conversion or None); and pattern -> conversion."""
    prefix = getattr(model, "base_model_prefix", "")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5 a checkpoint was loaded as it is

        def plain(name: str) -> tuple[str, None]:
            others = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            return next((other for other in others if other in shapes), name), None

        return plain, {}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(name: str) -> tuple[str, str | None]:
        found = rename_source_key(name, renamings, converters, prefix=prefix, meta_state_dict=shapes)
        if found[0] not in shapes and name in shapes:
            found = rename_source_key(name, [], [], prefix=prefix, meta_state_dict=shapes)
        return found

    return rename, {pattern: converter for converter in converters for pattern in converter.source_patterns}


def _places(recipe: _Recipe, shape: torch.Size) -> list[tuple[StoredTensor, int]] | None:
    """Where the experts lie in the tensor that they are stacked into, as first elements: all along dimension 0, and,
    where there are several patterns, side by side along dimension 1. None for any other conversion."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in recipe.conversion.operations]
    patterns = recipe.conversion.source_patterns
    if operations != [("MergeModulelist", 0), ("Concatenate", 1)][: len(operations)] or len(operations) != min(
        2, len(patterns)
    ):
        return None
    columns = [recipe.sources.get(pattern, []) for pattern in patterns]
    size = math.prod(shape[1:])
    places = []
    for number, expert in enumerate(zip(*columns, strict=False)):
        start = number * size
        for source in expert:
            places.append((source, start))
            start += source.values
        if start != (number + 1) * size:
            return None
    return places if len(places) == shape[0] * len(columns) == sum(map(len, columns)) else None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _missing_message(missing: list[str], unused: list[StoredTensor], weights: Sequence[StoredTensor]) -> str:
    def some(names: list[str]) -> str:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return ", ".join(names[:_NAMED]) + more

    there = f"; of the checkpoint nothing was found for {some([t.name for t in unused])}" if unused else ""
    return (
        f"{weights[0].file.parent}: the model that config.json describes needs {some(missing)}, which the checkpoint "
        f"lacks{there}. Save the model again with the installed transformers, or judge the weights alone: "
        "--weights-only"
    )
