"""Hooks on verl's FSDP engine (FSDP1 and FSDP2, actor, reference policy and critic).

They act on an engine whose own ``mixed_precision`` carries the key ``verl_fp16``, and on no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from verl_fp16.loss_scaling import LossScaler
from verl_fp16.settings import LossScaleSettings


def settings_of(engine: Any) -> Mapping[str, Any] | None:
    """What rode to this engine in its role's ``mixed_precision.verl_fp16``; None without the flag."""
    mixed_precision = getattr(getattr(engine, "engine_config", None), "mixed_precision", None)
    return mixed_precision.get("verl_fp16") if mixed_precision is not None else None


def scaler_of(engine: Any) -> LossScaler | None:
    """The engine's loss scaler, if it is ours."""
    scaler = getattr(engine, "scaler", None)
    return scaler if isinstance(scaler, LossScaler) else None


def use_loss_scaler(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def _build_fsdp_module(self: Any, module: Any) -> Any:
        wrapped = original(self, module)
        settings = settings_of(self)
        if settings is not None and self.scaler is not None:
            self.scaler = None if self.engine_config.forward_only else _make_loss_scaler(settings)
        return wrapped

    return _build_fsdp_module


def _make_loss_scaler(settings: Mapping[str, Any]) -> LossScaler:
    from verl.utils.device import get_device_id, get_device_name

    device = get_device_id()
    device = f"{get_device_name()}:{device}" if isinstance(device, int) else device
    return LossScaler(LossScaleSettings(**settings["loss_scale"]), device)


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


def leave_out_norm_of_skipped_step(original: Callable[[Any], float]) -> Callable[[Any], float | None]:
    def optimizer_step(self: Any) -> float | None:
        grad_norm = original(self)
        scaler = scaler_of(self)
        return None if scaler is not None and scaler.last_step_skipped else grad_norm

    return optimizer_step


def report_loss_scale(original: Callable[..., Any]) -> Callable[..., Any]:
    def train_batch(self: Any, data: Any, loss_function: Callable[..., Any]) -> Any:
        outputs = original(self, data, loss_function)
        scaler = scaler_of(self)
        if scaler is not None and _ends_training_step(data) and self.is_mp_src_rank_with_outputs():
            # Lists, because verl chains the values of the data-parallel ranks.
            outputs["metrics"]["loss_scale"] = [scaler.scale_value]
            outputs["metrics"]["skipped_steps"] = [float(scaler.take_skipped())]
        return outputs

    return train_batch


def _ends_training_step(data: Any) -> bool:
    """Whether this is the last mini-batch of a training step; True where the caller has no such notion (SFT).

    verl averages metrics over mini-batches. A value that is there once a step is logged as it is.
    """
    from verl.utils import tensordict_utils as tu

    return bool(tu.get(data, key="update_lr_scheduler", default=True))
