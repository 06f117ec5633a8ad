"""Hooks on the weight sync: what the FSDP engine sends, and the audit around each sync in the trainer's process."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from verl_fp16 import plugin

# Module of an FSDP engine (FSDP1: the wrapped one) -> the sender of its weights, for what verl calls with the module.
_senders: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def send_in_rollout_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_per_tensor_param(self: Any, *args: Any, **kwargs: Any) -> Any:
        sender = _sender_of(self)
        if sender is None:
            return original(self, *args, **kwargs)
        _senders[getattr(self.module, "_fsdp_wrapped_module", self.module)] = sender
        sender.begin()
        weights, peft_config = original(self, *args, **kwargs)
        return sender.watch(weights), peft_config

    return get_per_tensor_param


def _sender_of(engine: Any) -> Any:
    if getattr(engine, "engine_config", None) is None:
        return None
    from verl_fp16.weight_sync.rank_calls import sender_of

    return sender_of(engine)


def make_images(original: Callable[..., Any]) -> Callable[..., Any]:
    def convert_weight_keys(state_dict: Any, model: Any) -> Any:
        params = original(state_dict, model)
        sender = _senders.get(model) if _senders else None
        if sender is None:
            return params
        from verl.utils.device import get_device_id

        return sender.images(params, get_device_id())

    return convert_weight_keys


def audit_update(original: Callable[..., Any]) -> Callable[..., Any]:
    from verl.utils.ray_utils import auto_await

    inner = inspect.unwrap(original)  # without auto_await, which looks at the frame that calls it

    async def update_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not plugin.flag_given:
            return await inner(self, *args, **kwargs)
        from verl_fp16.weight_sync.audited_sync import AuditedSync

        sync = self.__dict__.setdefault("_verl_fp16_sync", AuditedSync(self))
        sync.before()
        result = await inner(self, *args, **kwargs)
        found = sync.after()
        # Some trainers log what comes back; for the others verl_fp16.hooks.trainer does.
        return {**result, **found} if isinstance(result, dict) else result

    return auto_await(update_weights)
