"""Hooks on verl's FSDP engine (FSDP1 and FSDP2, actor, reference policy and critic).

They act on an engine whose own ``mixed_precision`` carries the key ``verl_fp16``, and on no other. What they do is in
:mod:`verl_fp16.loss_scaling` (which updates are skipped) and :mod:`verl_fp16.update_watch` (what is told of them); why
each is there, in the records of :mod:`verl_fp16.hooks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any

import torch

from verl_fp16.fault_injection import Fault
from verl_fp16.loss_scale_settings import FORWARD, LossScaleSettings
from verl_fp16.loss_scaling import LossScaler
from verl_fp16.update_watch import UpdateWatch

# What has to be finite in a forward pass beside the loss, by its name in verl's model output.
JUDGED_OUTPUTS = ("log_probs", "values")


def settings_of(engine: Any) -> Mapping[str, Any] | None:
    """What rode to this engine in its role's ``mixed_precision.verl_fp16``; None without the flag."""
    mixed_precision = getattr(getattr(engine, "engine_config", None), "mixed_precision", None)
    return mixed_precision.get("verl_fp16") if mixed_precision is not None else None


def watch_of(engine: Any) -> UpdateWatch | None:
    """The watch on the engine's updates, if its loss scaler is ours."""
    return getattr(engine, "_verl_fp16_watch", None)


def use_loss_scaler(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def _build_fsdp_module(self: Any, module: Any) -> Any:
        wrapped = original(self, module)
        settings = settings_of(self)
        if settings is not None and self.scaler is not None:
            self.scaler = None if self.engine_config.forward_only else _make_loss_scaler(settings)
            if self.scaler is not None:
                self._verl_fp16_watch = _make_watch(self.scaler, wrapped, settings)
        return wrapped

    return _build_fsdp_module


def _make_loss_scaler(settings: Mapping[str, Any]) -> LossScaler:
    from verl.utils.device import get_device_id, get_device_name

    device = get_device_id()
    device = f"{get_device_name()}:{device}" if isinstance(device, int) else device
    return LossScaler(LossScaleSettings(**settings["loss_scale"]), device)


def _make_watch(scaler: LossScaler, module: torch.nn.Module, settings: Mapping[str, Any]) -> UpdateWatch:
    faults = [Fault(**fault) for fault in settings.get("fault_injection") or ()]
    return UpdateWatch(scaler, module, role=settings["role"], folder=settings.get("folder"), faults=faults)


def forget_dropped_update(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def optimizer_zero_grad(self: Any) -> None:
        original(self)
        watch = watch_of(self)
        if watch is not None:
            watch.scaler.abandon()

    return optimizer_zero_grad


def judge_forward_pass(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_step(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        result = original(self, micro_batch, loss_function, forward_only)
        watch = watch_of(self)
        if watch is not None and not forward_only:
            _, output = result
            watch.scaler.note_forward(output["loss"], _judged_tensors(output["model_output"]))
        return result

    return forward_step


def _judged_tensors(model_output: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for name in JUDGED_OUTPUTS:
        tensor = model_output.get(name)
        if tensor is not None:
            yield tensor.values() if tensor.is_nested else tensor


def reduce_after_every_micro_batch(
    original: Callable[..., AbstractContextManager[None]],
) -> Callable[..., AbstractContextManager[None]]:
    def _gradient_sync_context(self: Any, *, is_last_micro_batch: bool) -> AbstractContextManager[None]:
        return original(self, is_last_micro_batch=is_last_micro_batch or _adds_up_in_float16(self))

    return _gradient_sync_context


def _adds_up_in_float16(engine: Any) -> bool:
    """Whether deferred gradients of this engine would add up in FP16: FSDP1 does so, FSDP2 adds up in FP32."""
    from verl.utils.fsdp_utils import fsdp_version

    return (
        settings_of(engine) is not None and engine._autocast_dtype is torch.float16 and fsdp_version(engine.module) == 1
    )


class _UnscaleOnly:
    """Stands in for the scaler in verl's ``optimizer_step``, which calls ``step`` before the norm is on the host.

    The norm comes there at the end of that method anyway; :func:`step_if_finite` decides the update then.
    """

    def __init__(self, watch: UpdateWatch) -> None:
        self._watch = watch

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self._watch.before_unscaling()
        self._watch.scaler.unscale_(optimizer)
        self._watch.after_unscaling()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def update(self) -> None:
        pass


def step_if_finite(original: Callable[[Any], float]) -> Callable[[Any], float | None]:
    def optimizer_step(self: Any) -> float | None:
        watch = watch_of(self)
        if watch is None:
            return original(self)
        scaler = watch.scaler
        self.scaler = _UnscaleOnly(watch)
        try:
            grad_norm = original(self)
        finally:
            self.scaler = scaler
        scaler.step(self.optimizer, grad_norm)
        findings = watch.take_findings()
        scaler.update()
        watch.record(findings)
        return None if scaler.last_step_skipped else grad_norm

    return optimizer_step


def watch_mini_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def train_batch(self: Any, data: Any, loss_function: Callable[..., Any]) -> Any:
        watch = watch_of(self)
        if watch is None:
            return original(self, data, loss_function)
        with watch.forward_and_backward():
            outputs = original(self, data, watch.loss_with_faults(loss_function))
        if ends_training_step(data):
            metrics = watch.take_step_metrics()
            if self.is_mp_src_rank_with_outputs():
                # Lists, because verl chains the values of the data-parallel ranks.
                outputs["metrics"].update({name: [value] for name, value in metrics.items()})
        return outputs

    return train_batch


def ends_training_step(data: Any) -> bool:
    """Whether this is the last mini-batch of a training step; True where the caller has no such notion.

    verl averages metrics over mini-batches. A value that is there once a step is logged as it is.
    """
    from verl.utils import tensordict_utils as tu

    return bool(tu.get(data, key="update_lr_scheduler", default=True))


def hold_schedule_without_update(original: Callable[[Any], float]) -> Callable[[Any], float]:
    def lr_scheduler_step(self: Any) -> float:
        watch = watch_of(self)
        if watch is None or watch.take_schedule_step():
            return original(self)
        return self.lr_scheduler.get_last_lr()[0]  # as verl: of the first group

    return lr_scheduler_step


def leave_out_metrics_of_faulty_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def _postprocess_output(self: Any, output: Any, **kwargs: Any) -> Any:
        final = original(self, output, **kwargs)
        watch = watch_of(getattr(self, "engine", None))
        if watch is not None and not kwargs["forward_only"] and watch.scaler.fault == FORWARD:
            from verl.utils import tensordict_utils as tu

            metrics = tu.get(final, "metrics")
            for name in [name for name, value in metrics.items() if not _is_finite(value)]:
                del metrics[name]
        return final

    return _postprocess_output


def _is_finite(value: Any) -> bool:
    """Whether a number, or each in nested lists, is finite; also verl's ``Metric``, by what it would be logged as."""
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    if hasattr(value, "aggregate"):
        value = value.aggregate()
    return math.isfinite(value) if isinstance(value, Real) else True


def keep_adapters_in_float32(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def _build_lora_module(self: Any, module: Any) -> Any:
        adapted = original(self, module)
        if settings_of(self) is not None:
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        return adapted

    return _build_lora_module
