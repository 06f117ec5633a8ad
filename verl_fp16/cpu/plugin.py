"""What verl loads for the CPU room: its own entry point in ``verl.plugins``, so that it works without the FP16 hooks.

The driver chooses the CPU when ``trainer.device=cpu``; every other process when its environment says so. verl swallows
an error that is raised here, and a process that goes on without the room would run on another device. So where the CPU
was chosen, the error is kept and raised at the first use of verl's platform.
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


class CpuRoomNotActive(RuntimeError):
    """This process was told to run on the CPU, and the adjustments for it could not be put in place."""


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
    _register_resolver()
    if not choice.chosen_by_environment():
        return
    try:
        from verl_fp16.cpu.activate import activate

        activate()
    except Exception as error:  # noqa: BLE001  verl would log whatever it is at DEBUG and train elsewhere
        _fail_at_first_use(error)


def _register_resolver() -> None:
    """Make ``${verl_fp16_cpu:...}`` resolve, which ``hardware=cpu`` asks for: this plugin is loaded."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("verl_fp16_cpu", lambda _: "loaded", replace=True)


def _fail_at_first_use(error: Exception) -> None:
    failure = CpuRoomNotActive(
        f"{choice.ENV_VAR}=cpu, but verl_fp16.cpu could not be put in place: {type(error).__name__}: {error}"
    )
    try:
        from verl.plugin.platform import platform_manager
    except ModuleNotFoundError:  # verl 0.8, which lets an error out of the modules that it is told to import
        raise failure from error

    class BrokenPlatform(platform_manager.PlatformBase):
        def __new__(cls) -> Any:
            raise failure from error

    platform_manager._current_platform = None
    platform_manager.PlatformRegistry.register(platform="cpu")(BrokenPlatform)


install()
