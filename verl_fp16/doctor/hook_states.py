"""The state of hooks after everything that they wait for has been imported. Runs in a process of its own."""

from __future__ import annotations

import importlib
from typing import Any


def hook_states(cpu: bool) -> list[dict[str, str]]:
    """Import the modules that the hooks are for, and report each hook: name, status, detail.

    Args:
        cpu: the hooks of the CPU room as well.
    """
    from verl_fp16 import hooks

    states = _states_of(hooks.patcher, hooks.HOOKS)
    if cpu:
        from verl_fp16.cpu import activate
        from verl_fp16.cpu import hooks as cpu_hooks
        from verl_fp16.cpu import plugin as cpu_plugin

        states += _states_of(cpu_plugin.patcher, cpu_plugin.DRIVER_HOOKS)
        states += _states_of(activate.patcher, cpu_hooks.CPU_HOOKS)
    return states


def _states_of(patcher: Any, hooks: tuple[Any, ...]) -> list[dict[str, str]]:
    """The one place that knows how a patcher tells what became of its hooks."""
    missing = {}
    for hook in hooks:
        try:
            importlib.import_module(hook.target.module)
        except Exception as error:  # noqa: BLE001  whatever a foreign module raises, it is this hook's row
            missing[hook.name] = f"{hook.target.module} cannot be imported: {type(error).__name__}: {error}"
    status = patcher.status()
    rows = []
    for hook in hooks:
        # What a patcher does not hold, it was not given for this release of verl.
        state, _, detail = status.get(hook.name, "not needed").partition(": ")
        rows.append({"name": hook.name, "status": state, "detail": missing.get(hook.name, detail)})
    return rows
