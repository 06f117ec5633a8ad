"""Weights arrive in the rollout without having been rounded to bfloat16 on the way."""

from __future__ import annotations

from collections.abc import Iterator

from verl_fp16.findings import Finding
from verl_fp16.guard.case import GENERATION, Case

# What each backend does with a weight, read in verl/checkpoint_engine of 0.8.0-0.9.1. Their rollout_dtype is a
# torch.dtype, which no configuration file can name, and nothing of verl sets it.
EXACT = ("naive", "nccl", "nixl")
ROUNDING = {
    "kimi_ckpt_engine": "it casts every weight to bfloat16 before sending",
    "mooncake": "it casts every weight to bfloat16 before sending",
    "delta_sharded": "it sends bfloat16, and its vLLM side refuses models in another dtype",
}
_WHY_IT_MATTERS = "the rollout would run with weights that have lost 3 of float16's bits: 1.001 arrives as 1.0"


def backend(case: Case) -> Iterator[Finding]:
    """``rollout.checkpoint_engine.backend``."""
    key = f"{GENERATION}.checkpoint_engine.backend"
    value = case.get(key, "naive")
    if value in EXACT:
        return
    if isinstance(value, str) and value in ROUNDING:
        if case.rollout == "bfloat16":
            why = f"{ROUNDING[value]}, on a way of its own, which the audit of the weight sync cannot follow"
        else:
            why = f"{ROUNDING[value]}, while {case.rollout} is declared for the rollout: {_WHY_IT_MATTERS}"
        yield Finding("error", key, value, why, (f"{key}={_fallback(case)}",))
    else:
        why = "a checkpoint engine that this package does not know: whether it rounds the weights is not checked"
        yield Finding("warning", key, value, why, (f"{key}={_fallback(case)}",))


def _fallback(case: Case) -> str:
    """verl's asynchronous trainers refuse naive."""
    return "nccl" if case.get("trainer.v1.trainer_mode", "sync") == "separate_async" else "naive"


def merged_lora(case: Case) -> Iterator[Finding]:
    """0.8.0's ``get_per_tensor_param`` takes aliases of the live weights out of ``merged_lora_context``."""
    key = "actor_rollout_ref.model.lora.merge"
    value = case.get(key, False)
    if value is not False and case.verl.startswith("0.8."):
        why = f"verl {case.verl} sends the weights after it has taken the adapters out of them again"
        yield Finding("error", key, value, why, (f"{key}=false",), "or use verl 0.9.0 or newer")


def adapters_of_fsdp1(case: Case) -> Iterator[Finding]:
    """On FSDP1 ``collect_lora_params`` of verl 0.8.0-0.9.1 finds no adapter: names in flat parameters have none."""
    rank = case.get("actor_rollout_ref.model.lora_rank", 0)
    key = "actor_rollout_ref.actor.strategy"
    merged = case.get("actor_rollout_ref.model.lora.merge", False)
    if case.get(key, None) == "fsdp" and isinstance(rank, int) and rank > 0 and not merged:
        why = "verl finds no adapters in an FSDP1 module: the rollout would run the base model"
        fix = tuple(f"actor_rollout_ref.{role}.strategy=fsdp2" for role in ("actor", "ref"))
        yield Finding("error", key, "fsdp", why, fix, "or actor_rollout_ref.model.lora.merge=true")


def large_weights(case: Case) -> Iterator[Finding]:
    """``verl_fp16.sync.on_overflow``: what is done to weights on their way does nothing for the actor itself."""
    policy = case.settings.sync.on_overflow if case.settings else "error"
    if policy != "error" and case.settings.train_dtype == case.rollout:
        why = (
            f"it is about what is sent and exported: the actor computes in {case.rollout} too, and makes inf of such "
            "weights itself. Where there are any, cut them in the checkpoint, or train in bfloat16"
        )
        key = "verl_fp16.sync.on_overflow"
        yield Finding("warning", key, policy, why, (f"{key}=error",))


RULES = (backend, merged_lora, adapters_of_fsdp1, large_weights)
