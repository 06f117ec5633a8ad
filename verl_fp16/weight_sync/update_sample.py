"""How many updates the rollout does not see: on a fixed sample of the weights, those that rounding hides."""

from __future__ import annotations

import torch

# A prime: a power of two would meet the same column of every row.
STRIDE = 1021


class UpdateSample:
    """Every 1021st weight of each tensor, held against itself one sync before.

    Memory: 4 bytes for each sampled weight, twice while a sync goes on.

    Args:
        dtype: the rollout's.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._before: dict[str, torch.Tensor] = {}
        self._now: dict[str, torch.Tensor] = {}

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Note the sample of a tensor, floating, of any shape; a name comes once in a sync."""
        if tensor.is_floating_point() and tensor.numel():
            self._now[name] = tensor.reshape(-1)[::STRIDE].clone()

    def read(self) -> dict[str, int]:
        """Counts over all tensors that came in this sync and in the last; waits for the device.

        ``sampled`` weights, ``changed`` ones among them, and of these the ``hidden`` ones, whose image in the rollout's
        dtype is what it was, and ``hidden_bf16``, whose image in bfloat16 would be.
        """
        names = sorted(name for name, sample in self._now.items() if _same_shape(self._before.get(name), sample))
        counts = dict.fromkeys(("sampled", "changed", "hidden", "hidden_bf16"), 0)
        for device in {self._now[name].device for name in names}:
            here = [name for name in names if self._now[name].device == device]
            numbers = self._compare(here)
            counts = {key: count + number for (key, count), number in zip(counts.items(), numbers, strict=True)}
        self._before.update(self._now)
        self._now = {}
        return counts

    def _compare(self, names: list[str]) -> list[int]:
        before, now = (torch.cat([samples[name] for name in names]) for samples in (self._before, self._now))
        changed = before != now
        hidden = changed & (before.to(self._dtype) == now.to(self._dtype))
        hidden_bf16 = changed & (before.bfloat16() == now.bfloat16())
        return [len(now), *torch.stack([changed.sum(), hidden.sum(), hidden_bf16.sum()]).tolist()]


def _same_shape(before: torch.Tensor | None, now: torch.Tensor) -> bool:
    return before is not None and before.shape == now.shape and before.device == now.device
