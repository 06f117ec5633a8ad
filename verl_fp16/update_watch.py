"""What goes on around the loss scaler of one engine: planted faults, the search for the module where a fault begins,
records of skipped updates, the counts of a training step. Pure torch.

Nothing of it runs in an update that is applied, but for the search, with ``trace_modules`` or right after a fault of
the forward pass, and for faults that are planted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from verl_fp16.attribution import NonFiniteGradient, named_local_gradients, non_finite_gradients
from verl_fp16.fault_injection import Fault, FaultInjectionError
from verl_fp16.loss_scale_settings import FORWARD
from verl_fp16.loss_scaling import LossScaler
from verl_fp16.module_names import name_in_model
from verl_fp16.module_trace import ModuleTrace
from verl_fp16.ranks import of_all_ranks, rank_and_world_size
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

    Raises:
        FaultInjectionError: a fault is for a rank that is not there.

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
        self._rank, self._world_size = rank_and_world_size()
        self._trace: ModuleTrace | None = None
        self._gradients: list[NonFiniteGradient] = []
        self._update, self._scale_before = scaler.update_number, scaler.scale_value
        for fault in self._faults:
            if fault.rank >= self._world_size:
                raise FaultInjectionError(
                    f"verl_fp16.fault_injection: rank {fault.rank}: the {role} has ranks 0 to {self._world_size - 1}"
                )
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
            result = loss_function(*args, **kwargs)
            # verl calls the function of a distillation for its logits, too, and gets a dict.
            return (result[0] * left.pop(), *result[1:]) if left and isinstance(result, tuple) else result

        return faulty

    def _striking(self) -> list[Fault]:
        return [fault for fault in self._faults if fault.strikes(self._rank, self.scaler.update_number)]

    def before_unscaling(self) -> None:
        """Plant the faults of the gradients.

        Raises:
            FaultInjectionError: a rank holds no gradient of its fault's parameter; on all ranks.
        """
        self._update, self._scale_before = self.scaler.update_number, self.scaler.scale_value
        if not any(fault.target == "gradient" and self._update in fault.updates for fault in self._faults):
            return
        # All ranks know of it and hear of a failure, or the others would wait for the one that has stopped.
        failures = [failure for failure in of_all_ranks(self._plant_gradients()) if failure]
        if failures:
            raise FaultInjectionError(f"verl_fp16.fault_injection: {'; '.join(failures)}")

    def _plant_gradients(self) -> str:
        """Plant this rank's; what went wrong, or nothing."""
        gradients = named_local_gradients(self._module)
        held = {name_in_model(name): gradient for name, gradient in gradients if gradient.numel()}
        for fault in self._striking():
            if fault.target == "gradient" and fault.parameter not in held:
                return (
                    f"rank {self._rank} of the {self.role} holds no gradient of {fault.parameter!r}; it holds those of "
                    f"{', '.join(sorted(held))}"
                )
            if fault.target == "gradient":
                held[fault.parameter].view(-1)[0] = float(fault.value)
        return ""

    def after_unscaling(self) -> None:
        """If the update is skipped, find out which gradients are not finite, before clipping makes NaN of them all."""
        if self.scaler.fault is not None:
            self._gradients = non_finite_gradients(self._module)

    def take_findings(self) -> RankFindings | None:
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
            of_all_ranks(findings),
            role=self.role,
            update=self._update,
            kind=scaler.fault or "",
            scale=self._scale_before,
            scale_after=scaler.scale_value,
            consecutive=scaler.consecutive_skips,
        )
        if self._rank == 0:
            tell(self.last_skip.line())
            append(self.last_skip, self._folder)

    def take_step_metrics(self) -> dict[str, float]:
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

    def take_schedule_step(self) -> bool:
        """Whether the schedule may go on: an update was applied since the last call, or the settings do not ask."""
        before, self._scheduled = self._scheduled, self.scaler.total.applied
        return self._scheduled > before or not self.scaler.settings.hold_lr_on_skip
