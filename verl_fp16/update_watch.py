"""What goes on around the loss scaler of one engine: planted faults, the search for the module where a fault begins,
records of skipped updates, the counts of a training step. Pure torch; an update that is applied costs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from verl_fp16.attribution import NonFiniteGradient, named_local_gradients, non_finite_gradients
from verl_fp16.fault_injection import Fault, FaultInjectionError
from verl_fp16.loss_scale_settings import FORWARD
from verl_fp16.loss_scaling import LossScaler
from verl_fp16.module_names import name_in_model
from verl_fp16.module_trace import ModuleTrace
from verl_fp16.skip_records import RankFindings, SkipRecord, append
from verl_fp16.telling import tell


class UpdateWatch:
    """Watches the updates of one optimizer.

    Args:
        scaler: the loss scaler that decides them.
        module: the model, wrapped by FSDP.
        role: actor or critic.
        folder: the run's folder, under which skips are recorded; None for none.
        faults: what is planted.

    Attributes:
        last_skip: the record of the newest skipped update.
    """

    def __init__(
        self,
        scaler: LossScaler,
        module: torch.nn.Module,
        *,
        role: str,
        folder: str | Path | None = None,
        faults: Sequence[Fault] = (),
    ) -> None:
        self.scaler = scaler
        self.role = role
        self.last_skip: SkipRecord | None = None
        self._module = module
        self._folder = folder
        self._faults = [fault for fault in faults if fault.role == role]
        self._rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._trace: ModuleTrace | None = None
        self._gradients: list[NonFiniteGradient] = []
        self._scale_before = scaler.scale_value
        self.start_counting()

    def start_counting(self) -> None:
        """Count the updates of a training step, and of a step of the schedule, from here on."""
        self._reported = dataclasses.replace(self.scaler.total)
        self._scheduled = self.scaler.total.applied

    @contextmanager
    def forward_and_backward(self) -> Iterator[None]:
        """The passes of one mini-batch. After a fault of the forward pass they look for the module it begins in."""
        if not (self.scaler.settings.trace_modules or self.scaler.fault == FORWARD):
            yield
            return
        with ModuleTrace(self._module) as self._trace:
            try:
                yield
            finally:
                self._trace = None

    def loss_with_faults(self, loss_function: Callable[..., Any]) -> Callable[..., Any]:
        """``loss_function``, or one whose first loss carries the fault planted for this update."""
        striking = [fault for fault in self._striking() if fault.target == "loss"]
        if not striking:
            return loss_function
        left = [float(fault.value) for fault in striking]

        @functools.wraps(loss_function)
        def faulty(*args: Any, **kwargs: Any) -> Any:
            loss, *rest = loss_function(*args, **kwargs)
            return (loss * left.pop(), *rest) if left else (loss, *rest)

        return faulty

    def _striking(self) -> list[Fault]:
        return [fault for fault in self._faults if fault.strikes(self._rank, self.scaler.number)]

    def before_unscaling(self) -> None:
        """Plant the faults of the gradients.

        Raises:
            FaultInjectionError: this rank holds no gradient of a fault's parameter.
        """
        self._scale_before = self.scaler.scale_value
        for fault in self._striking():
            if fault.target == "gradient":
                self._gradient_of(fault).view(-1)[0] = float(fault.value)

    def _gradient_of(self, fault: Fault) -> torch.Tensor:
        gradients = named_local_gradients(self._module)
        held = {name_in_model(name): gradient for name, gradient in gradients if gradient.numel()}
        if fault.parameter not in held:
            raise FaultInjectionError(
                f"verl_fp16.fault_injection: rank {self._rank} of the {self.role} holds no gradient of "
                f"{fault.parameter!r}; it holds those of {', '.join(sorted(held))}"
            )
        return held[fault.parameter]

    def after_unscaling(self) -> None:
        """If the update is skipped, find out which gradients are not finite, before clipping makes NaN of them all."""
        if self.scaler.fault is not None:
            self._gradients = non_finite_gradients(self._module)

    def findings(self) -> RankFindings | None:
        """What this rank knows of an update that is skipped; None of one that is applied. Before ``update``."""
        if self.scaler.fault is None:
            return None
        gradients, self._gradients = tuple(self._gradients), []
        return RankFindings(
            rank=self._rank,
            gradients=gradients,
            forward_fault=self.scaler.forward_fault_here(),
            traced=self._trace is not None,
            module=self._trace.first_non_finite() if self._trace is not None else None,
        )

    def record(self, findings: RankFindings | None) -> None:
        """Record an update that was skipped: every rank keeps the record, rank 0 tells it and writes it down."""
        if findings is None:
            return
        scaler = self.scaler
        self.last_skip = SkipRecord.of_ranks(
            _of_all_ranks(findings),
            role=self.role,
            update=scaler.number - 1,
            kind=scaler.fault or "",
            scale=self._scale_before,
            scale_after=scaler.scale_value,
            consecutive=scaler.consecutive_skips,
        )
        if self._rank == 0:
            tell(self.last_skip.line())
            append(self.last_skip, self._folder)

    def step_metrics(self) -> dict[str, float]:
        """What the log says of the training step that ends here; begins to count the next one's updates."""
        scaler = self.scaler
        now = scaler.total.since(self._reported)
        self._reported = dataclasses.replace(scaler.total)
        return {
            "loss_scale": scaler.scale_value,
            "applied_steps": float(now.applied),
            "skipped_steps": float(now.skipped),
            "skipped_forward_steps": float(now.forward),
            "skipped_total": float(scaler.total.skipped),
            "consecutive_skips": float(scaler.consecutive_skips),
        }

    def schedule_may_advance(self) -> bool:
        """Whether an update was applied since the last call, or the settings do not ask for it."""
        before, self._scheduled = self._scheduled, self.scaler.total.applied
        return self._scheduled > before or not self.scaler.settings.hold_lr_on_skip


def _of_all_ranks(findings: RankFindings) -> list[RankFindings]:
    if not (dist.is_available() and dist.is_initialized()):
        return [findings]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, findings)
    return gathered
