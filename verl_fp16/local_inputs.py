"""Files and GPUs that a run needs and this machine does not have, found before Ray starts. Imports no torch or Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from verl_fp16.guard.case import Case

DATA = ("data.train_files", "data.val_files")
MODELS = ("actor_rollout_ref.model.path", "critic.model.path")
_INPUTS = {
    "gsm8k": "verl-fp16 data gsm8k PATH --output {folder}",
    "math": "verl-fp16 data math PATH --output {folder}",
    "sanity": "verl-fp16 sanity-set MODEL --data FILE --reward verl --output {folder}, and a test.parquet of your own",
}
# Below the root: AMD, WSL, Ascend, and parts of NVIDIA GPUs, which are counted in other ways.
_OTHER_GPUS = ("dev/kfd", "dev/dxg", "dev/davinci*", "proc/driver/nvidia/capabilities/gpu*/mig/gi*")
_MAKE = "python -m verl_fp16.quickstart.make {folder}"


def missing_inputs(config: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """A line for each data file or model that is not there, with the command that makes it.

    Nothing is said where the files may be elsewhere: on several nodes, on a cluster that is running, in a working
    directory of Ray's, behind a scheme (``hdfs://``), or where the data set is a class of the user's own. A model that
    may be a name on a hub (``owner/name``) is not looked for.

    Args:
        config: the configuration as plain containers, resolved.
    """
    case = Case(config, None, "")
    if case.get("trainer.nnodes", 1) != 1 or _is_elsewhere(case, environ):
        return []
    return [*_missing_data(case), *_missing_models(case)]


def missing_gpus(config: Mapping[str, Any], environ: Mapping[str, str], root: Path = Path("/")) -> list[str]:
    """A line where a single node's run wants more GPUs than there are, for which Ray would wait.

    Nothing is said where that cannot be known: with another device than ``cuda``, GPUs that are given to Ray by number,
    other makers' GPUs, or NVIDIA's when they are cut into instances.
    """
    case = Case(config, None, "")
    wanted = case.get("trainer.n_gpus_per_node", None)
    other = case.get("trainer.device", "cuda") != "cuda" or environ.get("VERL_PLATFORM", "") not in ("", "nvidia")
    if other or not isinstance(wanted, int) or case.get("trainer.nnodes", 1) != 1 or _is_elsewhere(case, environ):
        return []
    if case.get("ray_kwargs.ray_init.num_gpus", None) is not None:
        return []
    if any(list(root.glob(pattern)) for pattern in _OTHER_GPUS):
        return []
    there = len(list(root.glob("dev/nvidia[0-9]*")))
    if there >= wanted:
        return []
    fix = (
        f"trainer.n_gpus_per_node={there}, or a recipe for that many"
        if there
        else "a machine with GPUs, or a cpu_... recipe"
    )
    found = f"this machine has {there or 'no'} GPU{'s' * (there > 1)}"
    if_wrong = f"if that is wrong, +ray_kwargs.ray_init.num_gpus={wanted} says so"
    return [f"trainer.n_gpus_per_node={wanted}: {found}. Use {fix}; {if_wrong}"]


def _is_elsewhere(case: Case, environ: Mapping[str, str]) -> bool:
    running = Path(environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    address = case.get("ray_kwargs.ray_init.address", None) or environ.get("RAY_ADDRESS")
    if address != "local" and (address or running.exists()):
        return True
    return bool(case.get("ray_kwargs.ray_init.runtime_env.working_dir", None))


def _missing_data(case: Case) -> Iterator[str]:
    if case.get("data.custom_cls.path", None):
        return
    for key in DATA:
        files = case.get(key, None)
        for file in files if isinstance(files, list) else [files]:
            if isinstance(file, str) and not any(part in file for part in ("://", "*", "?", "[")) and not _there(file):
                yield f"{key}: there is no {file}. {_how_to_make(case, file)}"


def _missing_models(case: Case) -> Iterator[str]:
    for key in MODELS if case.has_critic else MODELS[:1]:
        path = case.get(key, None)
        made = isinstance(path, str) and path.startswith(f"{case.get('quickstart_dir', None)}/")
        if isinstance(path, str) and (made or _is_local(path)) and not _there(path):
            yield f"{key}: there is no {path}. {_how_to_make(case, path, model=True)}"


def _is_local(path: str) -> bool:
    """Whether it cannot be a name on a hub."""
    return "://" not in path and (path.startswith(("/", "~", ".")) or path.count("/") > 1)


def _there(path: str) -> bool:
    return os.path.exists(path) or os.path.exists(os.path.expanduser(path))


def _how_to_make(case: Case, path: str, model: bool = False) -> str:
    """The command that makes it, where it is one of those that our recipes name."""
    made, data = case.get("quickstart_dir", None), case.get("data_dir", None)
    if isinstance(made, str) and path.startswith(f"{made}/"):
        experts = " --experts" if str(case.get(MODELS[0], "")).endswith("/model-moe") else ""
        return f"Make it: {_MAKE.format(folder=made)}{experts}"
    if model:
        return "Put the model there, or name another folder or a hub's model"
    command = _INPUTS.get(str(case.get("recipe.task", ""))) if os.path.dirname(path) == data else None
    return f"Make it: {command.format(folder=data)}" if command else "Name another, or make one: verl-fp16 data --help"
