"""What a process in which verl was imported looks like, written as JSON. Run by ``test_off`` in fresh processes.

    python process_state.py OUT {plain|installed} TARGETS

``plain`` hides this package from the process: no plugin, no Hydra plugin. ``installed`` leaves everything to verl.
TARGETS is a JSON list of ``module:Class.attribute``. Nothing of ours is imported here before verl was, so that what
verl's import brings with it can be told.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import inspect
import json
import logging
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

OURS = "verl_fp16"

# What a run of verl imports: the driver, the trainers, the FSDP engine's workers, the registries.
USED_BY_A_RUN = (
    "verl.trainer.main_ppo",
    "verl.trainer.ppo.ray_trainer",
    "verl.trainer.ppo.v1",
    "verl.workers.engine",
    "verl.workers.engine_workers",
    "verl.workers.reward_manager",
    "verl.workers.rollout.replica",
    "verl.checkpoint_engine",
    "verl.experimental.agent_loop",
    "verl.experimental.reward_loop",
    "verl.utils.debug.metrics",
)
CONFIGURATIONS = ("ppo_trainer", "sft_trainer_engine", "evaluation")
REGISTRY_WORDS = ("registry", "registered", "_engines", "_platforms", "_backends")


def hide_our_package() -> None:
    """As if it were not installed. ``hydra_plugins`` goes too: in it there is our search path plugin."""
    sys.modules[OURS] = sys.modules["hydra_plugins"] = None  # type: ignore[assignment]


def seed_everything() -> None:
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def modules_loaded() -> list[str]:
    return sorted(name for name, module in sys.modules.items() if module is not None)


def process_state() -> dict[str, Any]:
    """What any import could change behind the back of the program."""
    import numpy
    import torch

    root = logging.getLogger()
    return {
        "environment": dict(os.environ),
        "root logger": [root.level, root.disabled, [repr(h) for h in root.handlers], [repr(f) for f in root.filters]],
        "verl's logger": [logging.getLogger("verl").level, [repr(h) for h in logging.getLogger("verl").handlers]],
        "logging": [logging.root.manager.disable, logging.getLoggerClass().__name__, logging.raiseExceptions],
        "warnings": [repr(entry) for entry in warnings.filters],
        "sys.path": [*sys.path],
        "import hooks": [_named(hook) for hook in sys.path_hooks],
        "hooks of the interpreter": [_named(h) for h in (sys.excepthook, sys.displayhook, threading.excepthook)],
        "functions at exit": atexit._ncallbacks(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "signals": {str(number): _named(signal.getsignal(number)) for number in signal.valid_signals()},
        "torch": {
            "default dtype": str(torch.get_default_dtype()),
            "default device": str(torch.get_default_device()),
            "grad": torch.is_grad_enabled(),
            "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul": torch.get_float32_matmul_precision(),
            "autocast": [[torch.is_autocast_enabled(d), str(torch.get_autocast_dtype(d))] for d in ("cpu", "cuda")],
            "autocast cache": torch.is_autocast_cache_enabled(),
            "kernels under autocast": [torch._C._dispatch_dump(f"aten::{name}") for name in AUTOCAST_OPERATIONS],
            "seed": torch.initial_seed(),
        },
        "random numbers": [
            _digest(random.getstate()),
            _digest(numpy.random.get_state()),
            _digest(torch.get_rng_state().tolist()),
        ],
    }


# Those that the CPU room registers anew where it is chosen.
AUTOCAST_OPERATIONS = ("softmax.int", "log_softmax.int", "logsumexp")


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def describe_target(path: str) -> dict[str, Any] | None:
    """Everything that a caller, verl, Ray or pickle could tell a function by; None where the release lacks it."""
    module_name, _, qualname = path.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
        *parents, name = qualname.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        raw = inspect.getattr_static(owner, name)
    except (ImportError, AttributeError):
        return None
    function = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
    innermost = inspect.unwrap(function)
    return {
        "kind": type(raw).__name__,
        "own": name in vars(owner),
        "signature": str(inspect.signature(function)),
        "annotations": repr(getattr(function, "__annotations__", None)),
        "names": [function.__name__, function.__qualname__, function.__module__],
        "doc": function.__doc__,
        "coroutine": inspect.iscoroutinefunction(function),
        "generator": inspect.isgeneratorfunction(function),
        "async generator": inspect.isasyncgenfunction(function),
        "attributes": {
            key: _named(value)
            for key, value in sorted(getattr(function, "__dict__", {}).items())
            if key != "__wrapped__" and not key.startswith(f"_{OURS}_")
        },
        "original": _code(innermost),
        "pickled": _pickled(function),
    }


def _pickled(function: Any) -> str:
    try:
        return pickle.dumps(function).hex()
    except (AttributeError, pickle.PicklingError) as error:
        return str(error)


def _code(function: Any) -> list:
    code = getattr(function, "__code__", None)
    return [code.co_filename, code.co_firstlineno, _digest(code.co_code)] if code else [repr(function)]


def names_of_modules(paths: list[str]) -> dict[str, list[str]]:
    """Every name in the modules and classes that the targets live in."""
    names = {}
    for path in paths:
        module = sys.modules.get(path.partition(":")[0])
        if module is not None:
            names[module.__name__] = sorted(vars(module))
            owner = getattr(module, path.partition(":")[2].partition(".")[0], None)
            if inspect.isclass(owner):
                names[f"{module.__name__}:{owner.__name__}"] = sorted({n for c in owner.__mro__ for n in vars(c)})
    return names


def modules_of(package: str) -> list[ModuleType]:
    return [m for name, m in sorted(sys.modules.items()) if m is not None and name.partition(".")[0] == package]


def registries() -> dict[str, Any]:
    """Every mapping in verl's modules and classes that is named like a registry."""
    found = {}
    for module in modules_of("verl"):
        for name, value in vars(module).items():
            if (
                isinstance(value, dict)
                and name != "__warningregistry__"
                and any(word in name.lower() for word in REGISTRY_WORDS)
            ):
                found[f"{module.__name__}:{name}"] = _named(value)
            elif inspect.isclass(value) and value.__module__ == module.__name__:
                for attribute, inner in vars(value).items():
                    if isinstance(inner, dict) and any(word in attribute.lower() for word in REGISTRY_WORDS):
                        found[f"{module.__name__}:{value.__name__}.{attribute}"] = _named(inner)
    return found


def _named(value: Any) -> Any:
    """``value`` by names instead of addresses, so that two processes can be compared."""
    if isinstance(value, dict):
        return [[_named(key), _named(item)] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    if inspect.isclass(value) or isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__} {_code(inspect.unwrap(value))}"
    return value if isinstance(value, str | int | float | bool | None) else repr(value).split(" at 0x")[0]


def dispatched_methods() -> dict[str, Any]:
    """Worker methods that verl binds to its worker groups: they carry an attribute that a bare wrap would drop."""
    from verl.single_controller.base import Worker
    from verl.single_controller.base.decorator import MAGIC_ATTR

    found = {}
    for worker in _subclasses(Worker):
        for name in dir(worker):
            attribute = getattr(inspect.getattr_static(worker, name), MAGIC_ATTR, None)
            if attribute is not None:
                found[f"{worker.__module__}.{worker.__qualname__}.{name}"] = _named(attribute)
    return found


def _subclasses(root: type) -> Iterator[type]:
    for child in root.__subclasses__():
        yield child
        yield from _subclasses(child)


def configurations() -> dict[str, str]:
    """verl's own configurations as Hydra composes them, and after the first thing each entry point does with one."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from verl.utils import device

    found = {}
    with initialize_config_module("verl.trainer.config", version_base=None):
        for name in CONFIGURATIONS:
            config = compose(name)
            found[name] = OmegaConf.to_yaml(config, resolve=False)
            if "trainer" in config:
                device.auto_set_device(config)
                found[f"{name} in the driver"] = OmegaConf.to_yaml(config, resolve=False)
    return found


def resolvers() -> list[str]:
    from omegaconf.basecontainer import BaseContainer
    from omegaconf.omegaconf import OmegaConf  # noqa: F401  registers OmegaConf's own

    return sorted(BaseContainer._resolvers)


def functions_of_ours_elsewhere() -> dict[str, str | None]:
    """``module:attribute`` -> its hook, for each function that our package defined and foreign code holds."""
    ours = f"{Path(sys.modules[OURS].__file__).parent}{os.sep}"
    found = {}
    for module_name, module in sorted(sys.modules.items()):
        if module is None or module_name.partition(".")[0] in (OURS, "hydra_plugins", "__main__"):
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            held = {name: value}
            # By its dict and not by isinstance: lazy modules and deprecated names answer that with an import.
            if isinstance(value, type) and value.__module__ == module_name:
                held = {f"{name}.{attribute}": inner for attribute, inner in list(vars(value).items())}
            for path, item in held.items():
                function = item.__func__ if type(item) in (staticmethod, classmethod) else item
                if type(function) is not FunctionType:
                    continue
                hook = vars(function).get(f"_{OURS}_hook")  # also in what a decorator of verl's has made of ours
                if hook is not None or function.__code__.co_filename.startswith(ours):
                    found[f"{module_name}:{path}"] = hook
    return found


def main(out: str, what: str, targets: list[str]) -> None:
    if what == "plain":
        hide_our_package()
    seed_everything()
    import verl

    os.environ.pop("VERL_USE_EXTERNAL_MODULES", None)  # how a release below 0.9 is told of the plugins
    state: dict[str, Any] = {"verl": verl.__version__, "modules after import verl": modules_loaded()}
    state["meta_path"] = [type(f).__name__ if not inspect.isclass(f) else f.__name__ for f in sys.meta_path]
    state["process after import verl"] = process_state()
    for name in USED_BY_A_RUN:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # this release has no such module
                raise
    state["targets"] = {path: describe_target(path) for path in targets}
    state["names"] = names_of_modules(targets)
    state["registries"] = registries()
    state["dispatched methods"] = dispatched_methods()
    state["configurations"] = configurations()
    state["resolvers"] = resolvers()
    state["process"] = process_state()
    state["modules"] = modules_loaded()
    if what == "installed":
        warnings.simplefilter("ignore")  # of deprecated names, when every module is looked through
        from verl_fp16.hooks import patcher

        state["hooks"] = patcher.status()
        state["functions of ours elsewhere"] = functions_of_ours_elsewhere()
        from pass_through import findings

        state["pass through"] = findings()
    Path(out).write_text(json.dumps(state))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
