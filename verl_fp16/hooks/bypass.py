"""Hooks on the actor's FSDP ranks in bypass mode, where old log-probabilities are those of the rollout.

They act on an actor whose ``mixed_precision.verl_fp16`` says ``bypass_mode``, and on no other engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from verl_fp16 import plugin
from verl_fp16.hooks.engine import ends_training_step, settings_of
from verl_fp16.mismatch.first_mini_batch import FirstMiniBatch

# Without "min" and "max" in it, by which verl would reduce what is logged.
FIRST_MINI_BATCH = "mismatch_first_update/"


def first_mini_batch_of(engine: Any) -> FirstMiniBatch | None:
    """The engine's, made with the first call; None outside of bypass mode."""
    found = getattr(engine, "_verl_fp16_first_mini_batch", None)
    if found is None and (settings_of(engine) or {}).get("bypass_mode"):
        found = engine._verl_fp16_first_mini_batch = FirstMiniBatch()
    return found


def measure_first_mini_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_step(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        result = original(self, micro_batch, loss_function, forward_only)
        first = first_mini_batch_of(self)
        if first is None or forward_only:
            return result
        log_probs = result[1]["model_output"].get("log_probs")
        if log_probs is None:  # of a distillation, which may have no old ones either
            return result
        if first.running:
            first.take(*_rollout_and_training(micro_batch, log_probs.detach()))
        else:
            first.count(*(_flat(micro_batch[name]) for name in ("old_log_probs", "response_mask")))
        return result

    return forward_step


def _rollout_and_training(micro_batch: Any, log_probs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """log mu, log pi, mask and tokens of a micro-batch, padded to (sequences, positions) as verl's loss pads them."""
    from verl.workers.utils.padding import no_padding_2_padding

    parts = micro_batch.select("old_log_probs", "response_mask", "responses").to_padded_tensor().to(log_probs.device)
    training = no_padding_2_padding(log_probs, micro_batch)
    return parts["old_log_probs"], training, parts["response_mask"], parts["responses"]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.values() if tensor.is_nested else tensor


def log_first_mini_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def train_batch(self: Any, data: Any, loss_function: Callable[..., Any]) -> Any:
        first = first_mini_batch_of(self)
        if first is None:
            return original(self, data, loss_function)
        first.begin()
        outputs = original(self, data, loss_function)
        last, group = ends_training_step(data), self.get_data_parallel_group()
        gap = {FIRST_MINI_BATCH + name: value for name, value in first.end(last, group).items()}
        if last:
            gap["mismatch/nonfinite_rollout"] = first.take_nonfinite(group)
        if self.is_mp_src_rank_with_outputs():
            outputs["metrics"].update({name: [value] for name, value in gap.items()})
        return outputs

    return train_batch


def leave_out_of_policy_loss(original: Callable[[str], Callable[..., Any]]) -> Callable[[str], Callable[..., Any]]:
    def get_policy_loss_fn(name: str) -> Callable[..., Any]:
        policy_loss = original(name)
        if not plugin.flag_given:
            return policy_loss

        @functools.wraps(policy_loss)
        def with_finite_rollout(*args: Any, **kwargs: Any) -> Any:
            if "old_log_prob" in kwargs and _is_bypassing(kwargs.get("config")):
                old, log_prob = kwargs["old_log_prob"], kwargs["log_prob"]
                finite = torch.isfinite(old)
                kwargs["old_log_prob"] = torch.where(finite, old, log_prob.detach())
                kwargs["response_mask"] = kwargs["response_mask"] * finite
            return policy_loss(*args, **kwargs)

        return with_finite_rollout

    return get_policy_loss_fn


def _is_bypassing(config: Any) -> bool:
    mixed_precision = getattr(getattr(config, "fsdp_config", None), "mixed_precision", None)
    ours = mixed_precision.get("verl_fp16") if mixed_precision is not None else None
    return bool(ours and ours.get("bypass_mode"))
