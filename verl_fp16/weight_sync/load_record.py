"""Watching a model load weights: which tensor of the stream ends where, in which dtype. Pure torch.

A loader may rename, fuse, slice, transpose and cast. Rather than knowing how, :class:`LoadRecord` sees every copy that
torch makes while weights are loaded, and follows what it is made of back to the stream.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from verl_fp16.weight_sync.digest import additive_digest, as_unsigned, total

_ATEN = torch.ops.aten
# What brings values into another place or dtype, and nothing else.
_COPIES = {_ATEN.clone.default, _ATEN._to_copy.default, _ATEN.copy_.default}


@dataclass(frozen=True)
class Copy:
    """A part of a tensor of the stream, copied into a part of a target.

    Args:
        name: of the tensor in the stream.
        target: name of the model's parameter or buffer.
        place: offset from the target's first element, sizes and strides of the part that was written, in elements.
        digest: additive digest of what was written, in the target's dtype; an int64 scalar where the tensors are.
    """

    name: str
    target: str
    place: tuple[int, tuple[int, ...], tuple[int, ...]]
    digest: torch.Tensor


@dataclass(frozen=True)
class _Origin:
    """What a storage that is not of the stream was made of."""

    names: frozenset[str]
    exact: bool
    storage: StorageWeakRef


class LoadRecord:
    """What became of the tensors of a stream.

    Attributes:
        copies: by target and place; a later copy to the same place takes the former one's.
        dtypes: name in the stream -> dtypes of the targets that got it.
        altered: names of which a target got something that is not a mere copy.
        used: names with which something was computed that need not have ended in a target.
        seen: all names of the stream.
        reshaped: targets that something was done to after a copy.
    """

    def __init__(self) -> None:
        self.copies: dict[str, dict[tuple, Copy]] = {}
        self.dtypes: dict[str, set[torch.dtype]] = {}
        self.altered: set[str] = set()
        self.used: set[str] = set()
        self.seen: set[str] = set()
        self.reshaped: set[str] = set()
        self._addresses: dict[str, int] = {}

    def watching(self, weights: Iterable[tuple[str, torch.Tensor]], targets: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """A context in which ``weights`` are loaded.

        Args:
            weights: (name, tensor) of this part of the stream.
            targets: (name, parameter or buffer) of the model.
        """
        weights = list(weights)
        self.seen.update(name for name, _ in weights)
        targets = list(targets)
        self._addresses.update((name, tensor.data_ptr()) for name, tensor in targets)
        return _Watch(self, _Intervals(weights), _Intervals(targets))

    def mismatches(self, targets: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """Names in the stream of which some target does not hold what was copied into it.

        The digest of the whole target decides: it is the sum of those of the copies, whatever their order, and padding
        with zeros does not show. Where that differs and the target is still in its place, its parts are looked at: a
        part that nothing was copied into may hold anything. Waits for the device.

        Args:
            targets: as they are now, after all that follows the loading.
        """
        found: list[str] = []
        for target, tensor in targets:
            copies = list(self.copies.get(target, {}).values())
            if not copies or _holds_all(tensor, [copy.digest for copy in copies]):
                continue
            if tensor.data_ptr() == self._addresses.get(target):
                copies = [copy for copy in copies if not _holds_all(_part(tensor, copy.place), [copy.digest])]
            found += [f"{copy.name} (in {target})" for copy in copies]
        return list(dict.fromkeys(found))

    def not_loaded(self, targets: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """Names of the targets that nothing was copied into."""
        return [name for name, _ in targets if name not in self.copies]

    def partly_loaded(self, targets: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
        """Name of each target with elements that nothing was copied into, other than zeros -> how many those are.

        Of a target that something else than copies was made of, or that is in another place now, nothing is said.
        Waits for the device.
        """
        found = {}
        for name, tensor in targets:
            copies = self.copies.get(name, {})
            if not copies or tensor.data_ptr() != self._addresses.get(name) or name in self.reshaped:
                continue
            whole = sum(math.prod(sizes) for _, sizes, _ in copies) == tensor.numel()
            # Zeros beside the copies do not show in the digest; only what does is worth a copy of the tensor.
            if not whole and not _holds_all(tensor, [copy.digest for copy in copies.values()]):
                rest = tensor.detach().clone()
                for offset, sizes, strides in copies:
                    rest.as_strided(sizes, strides, rest.storage_offset() + offset).zero_()
                if left := int(torch.count_nonzero(rest)):
                    found[name] = left
        return found

    def idle(self) -> list[str]:
        """Names of the stream that were not copied anywhere, and with which nothing was computed."""
        return sorted(self.seen - self.dtypes.keys() - self.used - self.altered)


def _holds_all(tensor: torch.Tensor, digests: list[torch.Tensor]) -> bool:
    return as_unsigned(additive_digest(tensor)) == total([as_unsigned(digest) for digest in digests])


def _part(tensor: torch.Tensor, place: tuple[int, tuple[int, ...], tuple[int, ...]]) -> torch.Tensor:
    offset, sizes, strides = place
    return tensor.detach().as_strided(sizes, strides, tensor.storage_offset() + offset)


class _Watch(TorchDispatchMode):
    """Sees every operation that torch runs, below autograd and parameter classes."""

    def __init__(self, record: LoadRecord, weights: _Intervals, targets: _Intervals) -> None:
        super().__init__()
        self._record = record
        self._weights = weights
        self._targets = targets
        self._made: dict[int, _Origin] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _ATEN.copy_.default:
            self._copied(args[0], args[1])
        elif not isinstance(result, torch.Tensor) or not any(_share(result, given) for given in _tensors(args)):
            self._used(func, [*_tensors(args), *_tensors((kwargs or {}).values())], result)
        elif func._schema.is_mutable:
            self._changed_in_place(args[0], [*_tensors(args), *_tensors((kwargs or {}).values())])
        return result

    def _changed_in_place(self, changed: Any, given: list[torch.Tensor]) -> None:
        """Something else than a copy: what is held of a target cannot be held against what was copied any more."""
        self._record.altered |= frozenset().union(*(self._origin(tensor)[0] for tensor in given))
        where = self._targets.of(changed) if isinstance(changed, torch.Tensor) else None
        # Filling a part that pads, before or after a copy, is no change of what was copied.
        if where is not None:
            kept = self._record.copies.get(where[0], {})
            changes = [place for place in kept if _overlap(changed, where[1], place)]
            if changes:
                self._record.reshaped.add(where[0])
            for place in changes:
                self._record.altered.update(kept.pop(place).name.split("/"))

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        names, exact = self._origin(source)
        if not names:
            return
        where = self._targets.of(target)
        if where is None:
            self._record.used |= names
            self._remember(target, names, exact)
            return
        name, first = where
        if not exact or len(names) > 1:
            self._record.altered |= names
        place = ((target.data_ptr() - first) // target.element_size(), tuple(target.shape), tuple(target.stride()))
        digest = additive_digest(source.expand(target.shape).to(target.device, target.dtype))
        for source_name in names:
            self._record.dtypes.setdefault(source_name, set()).add(target.dtype)
        if target.numel() == 0:
            return
        kept = self._record.copies.setdefault(name, {})
        for older in [older for older in kept if _overlap(target, first, older)]:
            del kept[older]
        kept[place] = Copy("/".join(sorted(names)), name, place, digest)

    def _used(self, func: Any, given: list[torch.Tensor], result: Any) -> None:
        origins = [origin for origin in map(self._origin, given) if origin[0]]
        if not origins:
            return
        names = frozenset().union(*(names for names, _ in origins))
        self._record.used |= names
        exact = func in _COPIES and all(exact for _, exact in origins)
        made = list(_tensors((result,)))
        if not made:  # a number, on which the loader may do anything
            self._record.altered |= names
        for tensor in made:
            self._remember(tensor, names, exact)

    def _remember(self, tensor: torch.Tensor, names: frozenset[str], exact: bool) -> None:
        storage = tensor.untyped_storage()
        before = self._made.get(storage._cdata)
        if before is not None and not before.storage.expired():
            names, exact = names | before.names, exact and before.exact
        self._made[storage._cdata] = _Origin(names, exact, StorageWeakRef(storage))

    def _origin(self, tensor: torch.Tensor) -> tuple[frozenset[str], bool]:
        """Of which tensors of the stream this one is made, and whether it has nothing but their values."""
        found = self._weights.of(tensor)
        if found is not None:
            return frozenset((found[0],)), True
        made = self._made.get(tensor.untyped_storage()._cdata)
        if made is None or made.storage.expired():
            return frozenset(), True
        return made.names, made.exact


class _Intervals:
    """Finds the tensor, of those given, in whose memory another one begins."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        spans = sorted(
            (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
            for name, tensor in tensors
            if tensor.numel()
        )
        self._spans = spans
        self._starts = [span[:2] for span in spans]

    def of(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """(name, address of the first element), or None."""
        device, address = str(tensor.device), tensor.data_ptr()
        index = bisect.bisect_right(self._starts, (device, address)) - 1
        if index < 0 or not address:
            return None
        where, first, end, name = self._spans[index]
        return (name, first) if where == device and address < end else None


def _overlap(tensor: torch.Tensor, first: int, place: tuple[int, tuple[int, ...], tuple[int, ...]]) -> bool:
    """Whether a part of a target meets a part that was written before.

    Args:
        tensor: the part, in memory.
        first: address of the target's first element.
        place: the other one, see :class:`Copy`.
    """
    offset, sizes, strides = place
    mine = (tensor.data_ptr() - first) // tensor.element_size()
    if tuple(tensor.stride()) != strides or not strides or 0 in strides:
        # Parts of different layout: by their extents, which may be more than they are.
        end = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        return mine <= end and offset <= mine + _extent(tensor) // tensor.element_size() - 1
    for size, other, stride in sorted(zip(tensor.shape, sizes, strides, strict=True), key=lambda dim: -dim[2]):
        mine_at, mine = divmod(mine, stride)
        other_at, offset = divmod(offset, stride)
        if mine_at + size <= other_at or other_at + other <= mine_at:
            return False
    return True


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to behind the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _tensors(items: Iterable[Any]) -> Iterator[torch.Tensor]:
    for item in items:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from _tensors(item)


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
