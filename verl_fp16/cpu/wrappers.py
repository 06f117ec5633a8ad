"""The wrappers of :mod:`verl_fp16.cpu.hooks`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any


def gloo_process_group(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_global_process_group_ray(timeout_second: int | None = None, backend: str | None = None) -> None:
        return original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    return initialize_global_process_group_ray


def register_fsdp_engines(module: ModuleType) -> Callable[[], None]:
    from verl.workers.engine.base import EngineRegistry

    engines = {"language_model": module.FSDPEngineWithLMHead, "value_model": module.FSDPEngineWithValueHead}
    for model_type, engine in engines.items():
        EngineRegistry.register(model_type=model_type, backend=["fsdp", "fsdp2"], device="cpu")(engine)

    def undo() -> None:
        for model_type in engines:
            for backend in ("fsdp", "fsdp2"):
                del EngineRegistry._engines[model_type][backend]["cpu"]

    return undo


def leave_model_in_place(original: Callable[..., None]) -> Callable[..., None]:
    def stay(model: Any, *args: Any, **kwargs: Any) -> None:
        return None

    return stay


def accept_cpu_states(original: Callable[[list], None]) -> Callable[[list], None]:
    def check(module_states: list) -> None:
        return None

    return check


def load_value_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_valuehead_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification.from_pretrained(
            local_path,
            torch_dtype=torch_dtype,
            config=model_config,
            attn_implementation=model_config._attn_implementation,
            trust_remote_code=trust_remote_code,
        )

    return load_valuehead_model


def leave_unpinned(original: Callable[..., Any]) -> Callable[..., Any]:
    def pin_memory(self: Any, device: Any = None) -> Any:
        return self

    return pin_memory


def do_not_pin_memory(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, pin_memory: bool = True) -> None:
        original(self, pin_memory=False)

    return __init__


def keep_unpacked_weight(original: Callable[..., None]) -> Callable[..., None]:
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        return original(layer, remove_weight=False)

    return dispatch_cpu_unquantized_gemm


def pack_experts_again(original: Callable[..., None]) -> Callable[..., None]:
    def _setup_kernel(self: Any, layer: Any, w13: Any, w2: Any) -> None:
        loaded_before = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if loaded_before and self.unquantized_backend.name == "CPU":
            experts = self.moe_kernel.fused_experts
            _refuse_padded(experts)
            experts.process_weights_after_loading(layer)

    return _setup_kernel


def _refuse_padded(experts: Any) -> None:
    """Padding changes the shape that weights are loaded into, and is not undone before they are loaded again."""
    width = experts.moe_config.intermediate_size_per_partition
    padded = experts._padded_intermediate_size(experts.moe_config)
    if padded != width:
        raise RuntimeError(
            f"vLLM's CPU build pads experts of width {width} to {padded} and cannot take new weights for them then: "
            f"use a model whose moe_intermediate_size is a multiple of {experts._intermediate_alignment()}"
        )
