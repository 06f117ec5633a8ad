"""What verl loads for the CPU room: its own entry point in ``verl.plugins``, so that it works without the FP16 hooks.

The driver chooses the CPU when ``trainer.device=cpu``; every other process when its environment says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_fp16.cpu import choice
from verl_fp16.patching import Hook, Patcher, Target

DRIVER_HOOKS: tuple[Hook, ...] = (
    Hook(
        name="cpu.choose",
        target=Target("verl.utils.device:auto_set_device", ("config",)),
        wrapper="verl_fp16.cpu.plugin:choose_cpu_if_configured",
        why="trainer.device=cpu alone does not change verl's platform, and workers would fall back to nvidia",
        how="puts the CPU room into the driver and VERL_PLATFORM=cpu into the run's environment, on trainer.device=cpu",
        until="verl has a platform cpu and chooses it by trainer.device",
    ),
)

patcher = Patcher(DRIVER_HOOKS)


def choose_cpu_if_configured(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def auto_set_device(config: Any) -> None:
        if choice.chosen_by_config(config):
            from verl_fp16.cpu.activate import activate

            choice.hand_on_to_workers(config)
            activate()
        original(config)

    return auto_set_device


def install() -> None:
    """Put what this process needs in place. Idempotent."""
    patcher.apply()
    if choice.chosen_by_environment():
        from verl_fp16.cpu.activate import activate

        activate()


install()
