"""Loss scaling for sharded training, in pure torch.

The methods that a loop calls are those of :class:`torch.amp.GradScaler`: ``scale`` (of one tensor), ``unscale_``,
``step``, ``update``. Differences, each for a reason:

* The device is a parameter: ``ShardedGradScaler`` is made for CUDA and disables itself elsewhere.
* The fault is agreed with MAX over all ranks and read on the host once, in ``unscale_``: whoever looks at the gradients
  of a skipped update finds them as they were, no optimizer kernel sees ``found_inf`` (so fused optimizers need no
  special case), and nothing is waited for after the optimizer.
* A fault of the forward pass (a loss or log-probability that is not finite) is no overflow of the scaled gradients:
  it skips the update and leaves the scale alone.
* The scale is a Python float: reading it for a metric or a checkpoint costs no synchronisation.

Algorithm: Micikevicius et al., "Mixed Precision Training" (2018), section 3.2, as in torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from verl_fp16.loss_scale_settings import (
    FORWARD,
    GRADIENT,
    LARGEST_SCALE,
    NORM,
    SMALLEST_SCALE,
    LossScaleSettings,
)
from verl_fp16.ranks import in_group

_FORMAT = 1


class LossScaleStateError(ValueError):
    """A saved state of the scaler cannot be taken up; the message says why."""


@dataclass
class Updates:
    """Counts of updates (mini-batches)."""

    applied: int = 0
    skipped: int = 0
    forward: int = 0  # of the skipped ones, those for a fault of the forward pass

    def since(self, before: Updates) -> Updates:
        """The updates after ``before``."""
        return Updates(self.applied - before.applied, self.skipped - before.skipped, self.forward - before.forward)


def local_gradients(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """This rank's gradients of all parameters of ``optimizer``: the local shard of a DTensor, else the tensor."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None:
                yield gradient.to_local() if isinstance(gradient, DTensor) else gradient


class LossScaler:
    """Scales the loss, unscales the gradients and skips the updates with a fault, on all ranks alike.

    One per optimizer. Order of calls for one update: ``scale(loss).backward()`` and ``note_forward`` for each
    micro-batch, ``unscale_``, clipping, ``step``, ``update``.

    Args:
        settings: see :class:`~verl_fp16.loss_scale_settings.LossScaleSettings`.
        device: where the fault is agreed: the device of the gradients and of the process group.

    The ranks that share the optimizer step are those of the default process group; without one, this process is alone.

    Attributes:
        scale_value: the scale that the next loss is multiplied by.
        fault: why the update that was unscaled last is skipped, or None where it is not; until the next ``unscale_`` it
            is the previous update's.
        consecutive_skips: updates skipped in a row, up to now.
        total: updates since the start of training.
    """

    def __init__(self, settings: LossScaleSettings, device: torch.device | str):
        self.settings = settings
        self.scale_value = float(settings.init)
        self.growth_tracker = 0
        self.consecutive_skips = 0
        self.total = Updates()
        self.fault: str | None = None
        self._device = torch.device(device)
        self._outputs: list[torch.Tensor] = []
        self._bad_loss = False
        self._unscaled = self._stepped = False
        self._lowered = False
        self._skips_since_overflow = 0  # of the skips in a row, those after the newest overflow of the gradients
        self._inverse_scales: dict[torch.device, torch.Tensor] = {}
        self._ones: dict[torch.device, torch.Tensor] = {}

    def is_enabled(self) -> bool:
        """True: a scaler that is not wanted is not made."""
        return True

    def get_scale(self) -> float:
        """The scale that the next loss is multiplied by."""
        return self.scale_value

    @property
    def update_number(self) -> int:
        """The update under way, counted from 1; between two updates: the next one."""
        decided = self.total.applied + self.total.skipped
        return decided if self._stepped else decided + 1

    @property
    def last_step_skipped(self) -> bool:
        """Whether the newest update was skipped."""
        return self.fault is not None

    @property
    def stuck(self) -> bool:
        """Whether ``max_consecutive_skips`` are reached and a lower scale is no cure, or cannot be had."""
        limit = self.settings.max_consecutive_skips
        if self.consecutive_skips < limit or self._lowered:
            return False
        # Far above its floor, and after an overflow, the scale has still a way to go.
        cannot_go_lower = self.settings.mode == "static" or self.scale_value <= self.settings.min
        return cannot_go_lower or self._skips_since_overflow >= limit

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return ``loss`` times the scale, in float32 where ``loss`` is float16 (which the scale would overflow)."""
        return (loss.float() if loss.dtype == torch.float16 else loss) * self.scale_value

    def note_forward(self, loss: float, outputs: Iterable[torch.Tensor] = ()) -> None:
        """Take up what the forward pass of one micro-batch gave; it is judged in ``unscale_``.

        Args:
            loss: the loss, on the host.
            outputs: what has to be finite beside it, such as log-probabilities: floating tensors of any shape, which
                are kept until ``update`` and written back as they are.
        """
        self._bad_loss |= not math.isfinite(loss)
        self._outputs += (output.detach() if output.requires_grad else output for output in outputs)

    def forward_fault_here(self) -> bool:
        """Whether it was this rank's data of which the loss or an output is not finite. Before :meth:`update`.

        Reads from the device: for updates that are skipped.
        """
        return self._bad_loss or not all(bool(output.isfinite().all()) for output in self._outputs)

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale in place, and agree with all ranks whether the update has a fault.

        A rank without gradients takes part in the agreement too.

        Raises:
            RuntimeError: called twice without :meth:`update` between.
        """
        if self._unscaled:
            raise RuntimeError("unscale_() has already been called since the last update()")
        self._unscaled = True
        found = torch.zeros(2, 1, device=self._device)
        of_gradients, of_forward = found.unbind()
        self._unscale_and_check(local_gradients(optimizer), of_gradients, self._inverse_scales, 1.0 / self.scale_value)
        self._unscale_and_check(self._outputs, of_forward, self._ones, 1.0)
        if self._bad_loss:
            of_forward.fill_(1.0)
        if in_group():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        (gradient,), (forward,) = found.tolist()
        # What is not finite in the forward pass makes the gradients so, too.
        self.fault = FORWARD if forward else GRADIENT if gradient else None

    def _unscale_and_check(
        self,
        tensors: Iterable[torch.Tensor],
        found: torch.Tensor,
        factors: dict[torch.device, torch.Tensor],
        factor: float,
    ) -> None:
        """Multiply ``tensors`` by ``factor``, in place, and set ``found`` to 1 if one of them is not finite.

        One kernel for each device and dtype. ``factors`` keeps the factor on each device while it is the same.
        """
        by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        for tensor in tensors:
            by_kind[tensor.device, tensor.dtype].append(tensor)
        elsewhere: dict[torch.device, torch.Tensor] = {}
        for (device, _), members in by_kind.items():
            if device not in factors:
                factors[device] = torch.full((1,), factor, device=device)
            if device != found.device and device not in elsewhere:
                elsewhere[device] = torch.zeros(1, device=device)
            target = found if device == found.device else elsewhere[device]
            torch._amp_foreach_non_finite_check_and_unscale_(members, target, factors[device])
        for flag in elsewhere.values():
            found += flag.to(found.device)

    def step(self, optimizer: torch.optim.Optimizer, grad_norm: float | None = None) -> Any:
        """Call ``optimizer.step`` unless the update has a fault.

        Args:
            grad_norm: norm of the unscaled gradients of all ranks, on the host. One that is not finite although they
                are is a fault: clipping has made zeros of them.

        Returns:
            what the optimizer returned; None when the update was skipped.

        Raises:
            RuntimeError: called twice without :meth:`update` between.
        """
        if self._stepped:
            raise RuntimeError("step() has already been called since the last update()")
        if not self._unscaled:
            self.unscale_(optimizer)
        self._stepped = True
        if self.fault is None and grad_norm is not None and not math.isfinite(grad_norm):
            self.fault = NORM
        if self.fault is None:
            self.total.applied += 1
            self.consecutive_skips = 0
            self._skips_since_overflow = 0
            return optimizer.step()
        self.total.skipped += 1
        self.total.forward += self.fault == FORWARD
        self._skips_since_overflow = 0 if self.fault == GRADIENT else self._skips_since_overflow + 1
        self.consecutive_skips += 1
        return None

    def update(self) -> None:
        """Back off after an overflow of the gradients; grow after ``growth_interval`` applied updates without one.

        A skip that says nothing of the scale leaves both the scale and that count alone.

        Raises:
            RuntimeError: called without a :meth:`step` before.
        """
        if not self._stepped:
            raise RuntimeError("update() was called without step()")
        self.abandon()
        self._lowered = False
        if self.settings.mode == "static":
            return
        if self.fault == GRADIENT:
            self._lowered = self._move_to(max(self.scale_value * self.settings.backoff_factor, self.settings.min))
            self.growth_tracker = 0
        elif self.fault is None:
            self.growth_tracker += 1
            # A state may come from a run with a longer interval.
            if self.growth_tracker >= self.settings.growth_interval:
                self.growth_tracker = 0
                grown = self.scale_value * self.settings.growth_factor
                if self.settings.max is not None:
                    grown = min(grown, self.settings.max)
                if grown <= self.settings.ceiling:
                    self._move_to(grown)

    def abandon(self) -> None:
        """Forget what was noted of an update that will not be made, or has been decided."""
        self._unscaled = self._stepped = self._bad_loss = False
        self._outputs.clear()

    def _move_to(self, scale: float) -> bool:
        """Set the scale; whether that has moved it."""
        if scale == self.scale_value:
            return False
        self.scale_value = scale
        self._inverse_scales.clear()
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on alike: plain numbers, the same on all ranks."""
        return {
            "format": _FORMAT,
            "scale": self.scale_value,
            "growth_tracker": self.growth_tracker,
            "consecutive_skips": self.consecutive_skips,
            "skips_since_overflow": self._skips_since_overflow,
            "applied_total": self.total.applied,
            "skipped_total": self.total.skipped,
            "forward_total": self.total.forward,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from ``state``. The settings win: a static scale stays, a dynamic one keeps to ``min`` and ``max``.

        Returns:
            what of the state was not taken up, a sentence each.

        Raises:
            LossScaleStateError: it is none that :meth:`state_dict` gives.
        """
        _refuse_if_broken(state, self.state_dict().keys())
        self.growth_tracker = state["growth_tracker"]
        self.consecutive_skips = state["consecutive_skips"]
        self._skips_since_overflow = state["skips_since_overflow"]
        self.total = Updates(state["applied_total"], state["skipped_total"], state["forward_total"])
        self.fault = None
        saved, settings, changes = float(state["scale"]), self.settings, []
        if self.consecutive_skips >= settings.max_consecutive_skips:
            # What was tried since is worth as many attempts.
            changes.append(f"{self.consecutive_skips} skipped updates in a row are counted from 0 again")
            self.consecutive_skips = self._skips_since_overflow = 0
        if settings.mode == "static":
            scale, reason = float(settings.init), "loss_scale.mode is static"
        else:
            scale = min(max(saved, settings.min), settings.ceiling)
            reason = f"loss_scale.min is {settings.min:g}, loss_scale.max {settings.max}"
        self._move_to(scale)
        if scale != saved:
            changes.append(f"the saved loss scale {saved:g} became {scale:g}: {reason}")
        return changes


def _refuse_if_broken(state: Any, names: Iterable[str]) -> None:
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise LossScaleStateError(f"no state of a loss scaler in format {_FORMAT}: found {found!r}")
    for name in names:
        value = state.get(name)
        is_scale = name == "scale"
        right = isinstance(value, int | float if is_scale else int) and not isinstance(value, bool)
        if not right or not (SMALLEST_SCALE <= value <= LARGEST_SCALE if is_scale else value >= 0):
            raise LossScaleStateError(f"{name} of a loss scaler's state must be a number, got {value!r}")
