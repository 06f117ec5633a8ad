"""What verl loads: the entry point ``verl.plugins`` (verl >= 0.9), or ``VERL_USE_EXTERNAL_MODULES=verl_fp16.plugin``.

verl imports this module inside ``import verl`` in every process of a run: driver, task runner, FSDP workers, vLLM's
server, engine core and workers. Importing it puts the hooks in place. Hooks act only where the configuration asks for
it, and nothing heavy is imported for them before that.

verl swallows an error that is raised here. So it is kept, and raised where the flag is given: in the driver by
:mod:`verl_fp16.hooks.driver` or, if even that is not in place, when the configuration is resolved; in every worker by
:mod:`verl_fp16.required`, which the flag's configuration makes verl import.
"""

from __future__ import annotations

import os

from verl_fp16.switch import DISABLE_VAR, disabled, how_to_load

# Set when this process resolves a configuration with the flag: what has no configuration of its own at hand asks this.
flag_given = False

_error: Exception | None = None
_installed = False


class PluginNotActive(RuntimeError):
    """The precision flag is given in a process where the hooks are not in place."""


def not_loaded() -> PluginNotActive:
    """The error for a process in which verl has not imported this module."""
    return PluginNotActive(
        "the verl_fp16 precision flag is set, but verl did not load the plugin in this process. "
        + how_to_load("verl_fp16 (on a CPU verl_fp16_cpu too)", "verl_fp16.plugin")
    )


def install() -> None:
    """Put the hooks into this process. Idempotent; raises nothing: see :func:`require_active`."""
    global _installed, _error
    if _installed or disabled():
        return
    try:
        from verl_fp16.hooks import patcher

        patcher.apply()
        _register_resolver()
    except Exception as error:  # noqa: BLE001  whatever it is, it belongs where the flag is given, not into a DEBUG log
        _error = error
    else:
        _installed, _error = True, None


def _register_resolver() -> None:
    """Make ``${verl_fp16:<role>}`` resolve in this process."""
    from omegaconf import DictConfig, OmegaConf

    def answer(role: str, *, _root_: DictConfig) -> object:
        from verl_fp16.refusal import one_message

        with one_message(PluginNotActive):
            require_active()
            try:
                from verl_fp16.hooks.driver import role_settings
            except ImportError as error:
                raise PluginNotActive(f"the plugin could not be put in place: ImportError: {error}") from error
        return role_settings(role, _root_=_root_)

    OmegaConf.register_new_resolver("verl_fp16", answer, replace=True)


def require_active(verify: bool = False) -> None:
    """Raise unless every hook is, or will be, in place in this process.

    Args:
        verify: also hold every target against verl's source files, so that one whose module this process has not
            imported, or never will, is known to fit. Costs about a tenth of a second: meant for the driver.

    Raises:
        PluginNotActive: the plugin is switched off, or a hook failed; the message says which and what to do.
    """
    if disabled():
        raise PluginNotActive(
            f"the verl_fp16 precision flag is set, but {DISABLE_VAR}={os.environ[DISABLE_VAR]} switches verl_fp16 off. "
            f"Unset {DISABLE_VAR}, or drop the flag."
        )
    install()
    if _error is not None:
        raise PluginNotActive(
            f"the verl_fp16 precision flag is set, but the plugin could not be put in place in process {os.getpid()}: "
            f"{type(_error).__name__}: {_error}"
        ) from _error
    from verl_fp16.hooks import patcher
    from verl_fp16.patching import PatchError

    try:
        patcher.require()
        if verify:
            patcher.verify()
    except PatchError as error:
        raise PluginNotActive(
            f"the verl_fp16 precision flag is set, but its hooks do not fit this verl: {error}"
        ) from error


install()
