"""``python -m verl_fp16.doctor.probe SECTION FILE``: look at this process from inside, write what was found as JSON.

Run in a process of its own, so that the state of verl's plugins is a fresh process's, and a library that crashes takes
only its own answer with it. It must not import the plugin itself: that is verl's task, and what is being looked at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def look_at_devices() -> dict[str, Any]:
    """torch's build and the GPUs that it can use, each with a small matrix product in FP16."""
    import torch

    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "gpus": []}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        try:
            ones = torch.ones(64, 64, dtype=torch.float16, device=f"cuda:{index}")
            fp16 = "" if float((ones @ ones)[0, 0]) == 64.0 else "a product of ones came out wrong"
        except RuntimeError as error:
            fp16 = str(error).partition("\n")[0]
        gpu = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "memory": properties.total_memory,
            "fp16_error": fp16,
        }
        found["gpus"].append(gpu)
    return found


def look_at_plugin() -> dict[str, Any]:
    """What ``import verl`` alone puts in place, and then every hook once its module is imported."""
    from verl_fp16.cpu.choice import chosen_by_environment
    from verl_fp16.doctor.hook_states import hook_states

    found = state_after_import_verl()
    if found["loaded"]:
        from verl_fp16 import plugin

        # Hooks first: once require_active() has passed, one that fails raises out of the import that met it.
        if not plugin.disabled():
            found["hooks"] = hook_states(cpu=chosen_by_environment())
        try:
            plugin.require_active()
        except plugin.PluginNotActive as error:
            found["error"] = str(error)
    return found


def state_after_import_verl() -> dict[str, Any]:
    """Import verl and tell what that brought along. Names nothing of this module: it also runs in a Ray worker."""
    import sys

    import verl

    found = {
        "verl": verl.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "loaded": "verl_fp16.plugin" in sys.modules,
        "cpu_loaded": "verl_fp16.cpu.plugin" in sys.modules,
        "package": None,
        "error": "",
    }
    try:
        import verl_fp16

        found["package"] = verl_fp16.__version__
        if not found["loaded"]:
            import verl_fp16.plugin  # noqa: F401  if it cannot be imported, this says why, which verl keeps to itself
    except Exception as error:  # noqa: BLE001  the reason is what is asked for
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def look_at_ray() -> dict[str, Any]:
    """The same in a worker of a local Ray that lives as long as this process."""
    import ray

    from verl_fp16.leftovers import ray_temp_dir

    def look_from_worker() -> dict[str, Any]:
        found = state_after_import_verl()
        if found["loaded"]:
            from verl_fp16 import plugin

            try:
                plugin.require_active()
            except plugin.PluginNotActive as error:
                found["error"] = str(error)
        return found

    with ray_temp_dir() as folder:
        ray.init(
            address="local",
            num_cpus=1,
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=80 * 2**20,
            _temp_dir=str(folder),
        )
        try:
            found = ray.get(ray.remote(num_cpus=1, max_retries=0)(look_from_worker).remote())
        finally:
            ray.shutdown()
    return {**found, "ray": ray.__version__}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "devices": look_at_devices,
    "plugin": look_at_plugin,
    "ray": look_at_ray,
}


def main(section: str, target: str) -> None:
    try:
        found = SECTIONS[section]()
    except Exception as error:  # noqa: BLE001  it is the answer: another process shows it as a row of a table
        cause = getattr(error, "cause", None) or error  # Ray wraps what a worker raised in a traceback of its own
        found = {"failed": f"{type(cause).__name__}: {' '.join(str(cause).split())}"}
    Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
