"""Training engines: the flag is for verl's FSDP engine, and says so of every other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verl_fp16.findings import Finding
from verl_fp16.guard.case import ABSENT, GENERATION, OTHER_ENGINES, ROLES, Case

_TURBO_DTYPES = {"param_dtype": "bf16", "reduce_dtype": "fp32", "output_dtype": "bf16"}


def strategies(case: Case) -> Iterator[Finding]:
    """The engine of each role, and the engine group ``model_engine``."""
    for role in ROLES:
        for key in (f"{role.section}.strategy", f"{role.engine}.strategy"):
            value = case.get(key)
            if value is not ABSENT and value not in ("fsdp", "fsdp2"):
                yield _other_engine(key, value, ("fsdp2",), case)
    value = case.get("model_engine", "dp")
    if value != "dp":
        yield _other_engine("model_engine", value, ("dp",), case)


def _other_engine(key: str, value: Any, right: tuple[str, ...], case: Case) -> Finding:
    reason = OTHER_ENGINES.get(value) if isinstance(value, str) else None
    why = f"the flag is for verl's FSDP engine; of {value}: {reason}" if reason else f"verl has no engine {value!r}"
    advice = f"without the flag, verl {case.verl} trains with {value}" if reason else ""
    return Finding("error", key, value, why, (f"{key}={right[0]}",), advice)


def turbo_dtypes(case: Case) -> Iterator[Finding]:
    """``turbo_config`` is read by fsdp_turbo alone (0.9.1)."""
    for role in case.roles:
        plan = f"{role.engine}.turbo_config.distributed.fsdp_plan"
        for name, default in _TURBO_DTYPES.items():
            key = f"{plan}.{name}"
            value = case.get(key, default)
            if value != default:
                why = "only the engine fsdp_turbo, which the flag is not for, reads this key: nothing would change"
                yield Finding("error", key, value, why, (f"{key}={default}",), "or drop the override")


def quantization_aware_training(case: Case) -> Iterator[Finding]:
    """QAT trains and rolls out in 4-bit weights."""
    places = [
        *(f"{role.section}.qat" for role in ROLES),
        *(f"{role.engine}.qat" for role in ROLES),
        f"{GENERATION}.qat",
    ]
    for place in places:
        key = f"{place}.enable"
        value = case.get(key, False)
        if value is not False:
            why = "quantization-aware training computes with 4-bit weights, not in the declared dtypes"
            yield Finding("error", key, value, why, (f"{key}=false",))


def deferred_gradient_sync(case: Case) -> Iterator[Finding]:
    """FSDP1's ``no_sync`` accumulates unsharded gradients in the parameters' dtype (torch, ``_post_backward_hook``)."""
    by_default = case.verl not in ("0.8.0", "0.9.0")  # which have no such key; later, the dataclass says true
    for role in case.roles:
        key = f"{role.engine}.use_no_sync_for_gradient_accumulation"
        value = case.get(key, by_default)
        if (
            value is False
            or role.forward_only
            or case.train == "float32"
            or case.get(f"{role.section}.strategy") != "fsdp"
        ):
            continue
        why = (
            f"FSDP1 would add up the micro-batches' gradients in {case.train}, before the reduction in float32; FSDP2 "
            "adds them up in float32"
        )
        if case.train == "float16":
            why += ". There every sum is rounded, and can overflow: the flag has FSDP1 reduce after each micro-batch"
        severity = "error" if case.train == "float16" else "warning"
        yield Finding(severity, key, value, why, (case.set_to(key, "false"),), f"or {role.section}.strategy=fsdp2")


RULES = (strategies, turbo_dtypes, quantization_aware_training, deferred_gradient_sync)
