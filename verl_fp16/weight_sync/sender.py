"""The sending side of the weight sync, in every FSDP rank: weights in the rollout's dtype, counted and digested.

Of a sharded weight each rank casts the shard that it holds, so that the gathering moves half of the bytes as well, and
counts it once. What the rollout holds in another dtype, or may hold, goes as it is: which that is, the first sync
tells, in which everything does (:mod:`verl_fp16.weight_sync.receiver`). Torch alone; the hook is
:mod:`verl_fp16.hooks.weight_sync`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from verl_fp16.ranks import rank_and_world_size
from verl_fp16.weight_cast import CastMemory, CheckedCast
from verl_fp16.weight_sync.digest import as_unsigned, stream_digest
from verl_fp16.weight_sync.update_sample import UpdateSample

Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Learned:
    """What the rollout has said of the names in the stream.

    Args:
        narrow: may go in the rollout's dtype.
        exempt: held in other dtypes only, so that what the rollout's dtype would do to them says nothing.
    """

    narrow: frozenset[str]
    exempt: frozenset[str] = frozenset()


class WeightSender:
    """One rank's side of all syncs of a run.

    Args:
        dtype: the rollout's.
        on_overflow: as :class:`verl_fp16.weight_cast.CheckedCast`.
    """

    def __init__(self, dtype: torch.dtype, on_overflow: str = "error") -> None:
        self.dtype = dtype
        self._on_overflow = on_overflow
        # What the rollout has said of the names in the stream; None while it has not.
        self._learned: Learned | None = None
        # Name of a parameter -> the names under which it went into the stream: verl takes packed experts apart.
        self._streamed_as: dict[str, list[str]] = {}
        self._samples = UpdateSample(dtype)
        self._digests_wanted = False
        # For weights on the CPU: up to four images of the largest are kept for as long as the run lasts.
        self._memory = CastMemory(dtype)
        self._rounds: list[_Round] = []

    def learn(self, learned: Learned | None) -> None:
        """Take in what the rollout has said; None where it has said nothing yet."""
        self._learned = learned

    def prepare(self, *, digests: bool) -> None:
        """Get ready for a sync, whose stream is digested or not."""
        self._digests_wanted = digests
        self._rounds.clear()

    def begin(self) -> None:
        """A stream of weights begins; LoRA's first sync has two, of which the second is taken first."""
        # Of syncs that nobody asks for a report of, nothing piles up.
        self._rounds = [*self._rounds[-1:], _Round(self.dtype, self._on_overflow, self._memory)]

    def images(self, params: Mapping[str, torch.Tensor], device: Any) -> Mapping[str, torch.Tensor]:
        """``params`` with whole tensors, ready to be sent, made one at a time as the items are taken.

        Args:
            params: parameters and buffers of the module, DTensors or whole; names as verl sends them, or packed.
            device: where shards are gathered.
        """
        return _LazyParams(params, lambda: self._images(params, device, self._rounds[-1]))

    def watch(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """The stream as it leaves; what is in it is noted as it is taken."""
        return self._watched(weights, self._rounds[-1])

    def _watched(self, weights: Weights, this: _Round) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            this.note(name, tensor, self._digests_wanted)
            yield name, tensor
        self._streamed_as.update(this.streamed_as)

    def report(self) -> dict[str, Any]:
        """What was sent since :meth:`prepare` or the last report, in plain types; waits for the device.

        ``bytes`` of the stream; ``values``: the cast's counts in total; ``faults``: those of each parameter with values
        that overflowed or were not finite, and ``streamed_as``: its names in the stream; each value is counted on one
        rank; ``sample``: see :class:`UpdateSample`; ``stream``: a list of (name, dtype, shape, digest) where digests
        were wanted.
        """
        rounds, self._rounds = self._rounds, []
        counts = [item for this in rounds for item in this.counted.counts().items()]
        total = sum((c for _, c in counts), type(counts[0][1])()) if counts else None
        faults = {name: asdict(c) for name, c in counts if c.overflow or c.non_finite}
        return {
            "rank": rank_and_world_size()[0],
            "bytes": sum(this.bytes for this in rounds),
            "values": total and asdict(total),
            "faults": faults,
            "streamed_as": {name: self._streamed_as.get(name, []) for name in faults},
            "sample": self._samples.read(),
            "stream": [entry for this in rounds for entry in this.digests()],
        }

    def _images(
        self, params: Mapping[str, torch.Tensor], device: Any, this: _Round
    ) -> Iterator[tuple[str, torch.Tensor]]:
        # What goes as it is goes first: verl 0.8 does not align tensors in its bucket, where a float32 one must not
        # follow an odd number of float16 values.
        for name in sorted(params, key=self._goes_narrow):
            param = params[name].detach()
            this.now = name
            if isinstance(param, DTensor):
                param = param.to(device, non_blocking=True)
                yield name, self._gathered(name, param, this)
            else:
                image = self._image(name, param, rank_and_world_size()[0] == 0, this)
                yield name, self._as_it_is(param) if image is None else image

    def _gathered(self, name: str, param: DTensor, this: _Round) -> torch.Tensor:
        image = self._image(name, param.to_local(), _is_first_copy(param), this)
        if image is None:
            return self._as_it_is(param.full_tensor())
        return DTensor.from_local(
            image, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        ).full_tensor()

    def _image(self, name: str, tensor: torch.Tensor, mine: bool, this: _Round) -> torch.Tensor | None:
        """What goes instead of ``tensor``; None for itself. What goes as it is and is rounded there counts too."""
        if self._are(name, self._learned and self._learned.exempt):
            return None
        if mine:
            self._samples.take(name, tensor)
        image = (this.counted if mine else this.copies)(name, tensor)
        return image if self._goes_narrow(name) else None

    def _as_it_is(self, tensor: torch.Tensor) -> torch.Tensor:
        """Under ``clamp``, while nothing is known, in bounds: what is held in float32 is cut too, in one sync."""
        if self._learned is None and self._on_overflow == "clamp" and tensor.is_floating_point():
            largest = torch.finfo(self.dtype).max
            return torch.where(tensor.isinf(), tensor, tensor.clamp(-largest, largest))
        return tensor

    def _goes_narrow(self, name: str) -> bool:
        return self._are(name, self._learned and self._learned.narrow)

    def _are(self, name: str, among: frozenset[str] | None) -> bool:
        names = self._streamed_as.get(name)
        return bool(among and names) and among.issuperset(names)


def _is_first_copy(param: DTensor) -> bool:
    """Whether this rank's shard is the one of its copies that is counted; of several replicas that is the first."""
    coordinates = param.device_mesh.get_coordinate()
    return coordinates is not None and all(
        where == 0 for where, placement in zip(coordinates, param.placements, strict=True) if placement.is_replicate()
    )


class _Round:
    """One stream: what was cast for it, and what went into it."""

    def __init__(self, dtype: torch.dtype, on_overflow: str, memory: CastMemory) -> None:
        self.counted = CheckedCast(dtype, on_overflow, memory)
        # Of what another rank counts.
        self.copies = CheckedCast(dtype, on_overflow, memory)
        self.bytes = 0
        self.now = ""
        self.streamed_as: dict[str, list[str]] = {}
        self._noted: list[tuple[str, torch.Tensor, torch.Size, torch.dtype]] = []

    def note(self, name: str, tensor: torch.Tensor, digest: bool) -> None:
        self.bytes += tensor.nbytes
        self.streamed_as.setdefault(self.now, []).append(name)
        if digest:
            self._noted.append((name, stream_digest(tensor), tensor.shape, tensor.dtype))

    def digests(self) -> list[tuple[str, str, tuple[int, ...], int]]:
        return read_digests(self._noted)


def read_digests(
    noted: list[tuple[str, torch.Tensor, torch.Size, torch.dtype]],
) -> list[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, digest) in plain types; waits for the device once."""
    numbers = torch.stack([digest for _, digest, _, _ in noted]).tolist() if noted else []
    return [
        (name, str(dtype).removeprefix("torch."), tuple(shape), as_unsigned(number))
        for (name, _, shape, dtype), number in zip(noted, numbers, strict=True)
    ]


class _LazyParams(dict):
    """A mapping whose values are the originals, but for ``items``, which makes them ready to be sent."""

    def __init__(self, params: Mapping[str, torch.Tensor], items: Any) -> None:
        super().__init__(params)
        self._items = items

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._items()
