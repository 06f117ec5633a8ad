"""Dynamic loss scaling for sharded training, in pure torch.

The methods that a loop calls are those of :class:`torch.amp.GradScaler`: ``scale`` (of one tensor), ``unscale_``,
``step``, ``update``; so verl's loop, written for torch's scaler, drives this one. Differences, each for a reason:

* The device is a parameter: ``ShardedGradScaler`` is made for CUDA and disables itself elsewhere.
* ``found_inf`` is agreed with MAX over all ranks, and the skip is decided on the host before the optimizer is called:
  no optimizer kernel sees it, so fused optimizers need no special case.
* The scale is a Python float: reading it for a metric or a checkpoint costs no synchronisation.

Algorithm: Micikevicius et al., "Mixed Precision Training" (2018), section 3.2, as in torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from verl_fp16.settings import LARGEST_SCALE, LossScaleSettings


def local_gradients(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """This rank's gradients of all parameters of ``optimizer``: the local shard of a DTensor, else the tensor."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None:
                yield gradient.to_local() if isinstance(gradient, DTensor) else gradient


class LossScaler:
    """Scales the loss, unscales the gradients and skips the updates whose gradients overflowed, on all ranks alike.

    One per optimizer. Order of calls for one update: ``scale(loss).backward()`` for each micro-batch, ``unscale_``,
    clipping, ``step``, ``update``.

    Args:
        settings: initial scale, factors, interval and floor.
        device: where ``found_inf`` lives: the device of the gradients and of the process group.
        process_group: the ranks that share the optimizer step; None for the default group.

    Attributes:
        scale_value: the scale that the next loss is multiplied by.
        last_step_skipped: whether the newest ``step`` was skipped.
        skipped_total: updates skipped since the start.
        applied_total: updates applied since the start.
    """

    def __init__(
        self,
        settings: LossScaleSettings,
        device: torch.device | str,
        process_group: dist.ProcessGroup | None = None,
    ):
        self.settings = settings
        self.scale_value = float(settings.init)
        self.growth_tracker = 0
        self.last_step_skipped = False
        self.skipped_total = 0
        self.applied_total = 0
        self._device = torch.device(device)
        self._process_group = process_group
        self._found_inf: torch.Tensor | None = None
        self._stepped = False
        self._inverse_scales: dict[torch.device, torch.Tensor] = {}
        self._reported_skips = 0

    def is_enabled(self) -> bool:
        """True: a scaler that is not wanted is not made."""
        return True

    def get_scale(self) -> float:
        """The scale that the next loss is multiplied by."""
        return self.scale_value

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return ``loss`` times the scale, in float32 where ``loss`` is float16 (which the scale would overflow)."""
        return (loss.float() if loss.dtype == torch.float16 else loss) * self.scale_value

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale in place and find out whether any of them, on any rank, is not finite.

        A rank without gradients takes part in the agreement too.

        Raises:
            RuntimeError: called twice without :meth:`update` between.
        """
        if self._found_inf is not None:
            raise RuntimeError("unscale_() has already been called since the last update()")
        by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        for gradient in local_gradients(optimizer):
            by_kind[gradient.device, gradient.dtype].append(gradient)
        found = {self._device: torch.zeros(1, device=self._device)}
        for (device, _), gradients in by_kind.items():
            if device not in found:
                found[device] = torch.zeros(1, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found[device], self._inverse_scale(device))
        found_inf = found.pop(self._device)
        for other in found.values():
            found_inf += other.to(self._device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX, group=self._process_group)
        self._found_inf = found_inf

    def _inverse_scale(self, device: torch.device) -> torch.Tensor:
        # Rebuilt only after the scale has moved: a kernel saved on every other step.
        if device not in self._inverse_scales:
            self._inverse_scales[device] = torch.full((1,), 1.0 / self.scale_value, device=device)
        return self._inverse_scales[device]

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Call ``optimizer.step`` unless a gradient overflowed on some rank.

        Returns:
            what the optimizer returned; None when the step was skipped.

        Raises:
            RuntimeError: called twice without :meth:`update` between.
        """
        if self._stepped:
            raise RuntimeError("step() has already been called since the last update()")
        if self._found_inf is None:
            self.unscale_(optimizer)
        self._stepped = True
        self.last_step_skipped = bool(self._found_inf.item() > 0)
        if self.last_step_skipped:
            self.skipped_total += 1
            return None
        self.applied_total += 1
        return optimizer.step(*args, **kwargs)

    def update(self) -> None:
        """Back off after a skipped step; grow after ``growth_interval`` applied steps in a row.

        Raises:
            RuntimeError: called without a :meth:`step` before.
        """
        if not self._stepped:
            raise RuntimeError("update() was called without step()")
        self._found_inf, self._stepped = None, False
        settings = self.settings
        before = self.scale_value
        if self.last_step_skipped:
            self.scale_value = max(self.scale_value * settings.backoff_factor, settings.min)
            self.growth_tracker = 0
        else:
            self.growth_tracker += 1
            if self.growth_tracker >= settings.growth_interval:
                # A scale that float32 cannot hold would turn every gradient into inf.
                grown = self.scale_value * settings.growth_factor
                self.scale_value = grown if grown <= LARGEST_SCALE else self.scale_value
                self.growth_tracker = 0
        if self.scale_value != before:
            self._inverse_scales.clear()

    def take_skipped(self) -> int:
        """Updates skipped since the last call of this method."""
        skipped = self.skipped_total - self._reported_skips
        self._reported_skips = self.skipped_total
        return skipped
