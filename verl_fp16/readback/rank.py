"""What one process runs, read from its live objects: an FSDP rank, a vLLM worker, or any process of the run.

A report is a dict of plain types (it travels through Ray, vLLM's message queue and JSON): ``host``, ``pid``, ``rank``
(None outside of a process group), ``versions`` and ``hooks`` by name, and ``roles``: role -> its fields. Dtypes go by
torch's names, ``float16``; where the parts of a model may differ, a field is the sorted list of what was found.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from verl_fp16 import __version__


def report_process() -> dict[str, Any]:
    """What every process says: who it is, its versions and the state of its hooks."""
    import verl

    from verl_fp16.hooks import patcher

    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "rank": None,
        "versions": {"verl_fp16": __version__, "verl": verl.__version__, "torch": str(torch.__version__)},
        "hooks": patcher.status(),
        "roles": {},
    }


def report_training_worker(worker: Any) -> dict[str, Any]:
    """What an FSDP rank says. ``worker`` is the Ray actor of one of verl's worker groups."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
    return {**report_process(), "rank": rank, "roles": {role: report_engine(e) for role, e in engines_of(worker)}}


def engines_of(worker: Any) -> Iterator[tuple[str, Any]]:
    """(role, engine) of every engine that lives in a Ray actor of verl's.

    verl puts the workers of one pool into one actor (``worker_dict``, or ``fused_worker_dict``): an
    ``ActorRolloutRefWorker``, whose ``actor`` and ``ref`` hold an engine each, and the critic's ``TrainingWorker``.
    """
    inner = getattr(worker, "worker_dict", None) or getattr(worker, "fused_worker_dict", None) or {"": worker}
    for part in inner.values():
        for role in ("actor", "ref"):
            engine = getattr(getattr(part, role, None), "engine", None)
            if engine is not None:
                yield role, engine
        if getattr(part, "engine", None) is not None:
            yield "critic", part.engine


def report_engine(engine: Any) -> dict[str, Any]:
    """What an FSDP engine of verl's computes in: see :data:`verl_fp16.readback.compare.TRAINING_FIELDS`."""
    module, optimizer = engine.module, getattr(engine, "optimizer", None)
    scaler = getattr(engine, "scaler", None)
    precision = list(fsdp_precision(module))
    updated = None if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "engine": type(engine).__name__,
        # verl's forward_step takes autocast's dtype from here, on each forward.
        "autocast": _name(getattr(engine, "_autocast_dtype", None)),
        "fsdp": sorted({kind for kind, *_ in precision}),
        "fsdp_param": _names(param for _, param, _, _ in precision),
        "fsdp_reduce": _names(reduce for _, _, reduce, _ in precision),
        # FSDP2 leaves buffers as they are.
        "fsdp_buffer": _names(buffer for kind, _, _, buffer in precision if kind == "FSDP1"),
        "parameters": _names(p.dtype for p in module.parameters()),
        "master": None if updated is None else _names(p.dtype for p in updated),
        "device": sorted({p.device.type for p in module.parameters()}),
        "attention": sorted(set(_attention(module))),
        **_report_scaler(scaler),
        **_report_skips(scaler, getattr(engine, "_verl_fp16_watch", None)),
    }


def _report_scaler(scaler: Any) -> dict[str, Any]:
    if scaler is None:
        return {"scaler": None, "scaler_device": None, "scaler_enabled": None, "scale": None, "scaler_settings": None}
    device, settings = getattr(scaler, "_device", None), getattr(scaler, "settings", None)
    return {
        "scaler": type(scaler).__name__,
        "scaler_device": None if device is None else torch.device(device).type,
        "scaler_enabled": bool(scaler.is_enabled()),
        "scale": float(scaler.get_scale()),
        "scaler_settings": None if settings is None else asdict(settings),
    }


def _report_skips(scaler: Any, watch: Any) -> dict[str, Any]:
    last = getattr(watch, "last_skip", None)
    return {
        "stuck": bool(getattr(scaler, "stuck", False)),
        "last_skip": None if last is None else asdict(last),
        "last_skip_line": "" if last is None else last.line(),
    }


def fsdp_precision(
    module: torch.nn.Module,
) -> Iterator[tuple[str, torch.dtype | None, torch.dtype | None, torch.dtype | None]]:
    """(FSDP1 or FSDP2, parameter, reduce and buffer dtype) in force, one for each wrapped module in ``module``."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for part in FullyShardedDataParallel.fsdp_modules(module):
        policy = part.mixed_precision
        yield "FSDP1", policy.param_dtype, policy.reduce_dtype, policy.buffer_dtype
    for part in module.modules():
        if isinstance(part, FSDPModule):
            policy = part._get_fsdp_state()._mp_policy
            yield "FSDP2", policy.param_dtype, policy.reduce_dtype, None


def _attention(module: torch.nn.Module) -> Iterator[str]:
    """The attention implementation of every part of a Hugging Face model that has its configuration at hand."""
    for part in module.modules():
        found = getattr(getattr(part, "config", None), "_attn_implementation", None)
        if isinstance(found, str):
            yield found


def report_rollout_worker(worker: Any) -> dict[str, Any]:
    """What a vLLM worker says: see :data:`verl_fp16.readback.compare.ROLLOUT_FIELDS`."""
    runner = worker.model_runner
    config = runner.vllm_config
    kv_caches = list(_tensors(getattr(runner, "kv_caches", ())))
    model = runner.get_model()  # without what CUDA graphs wrap it in
    parameters = list(model.parameters())
    fields = {
        "model": type(model).__name__,
        "model_dtype": _name(config.model_config.dtype),
        "parameters": _names(p.dtype for p in parameters),
        "kv_cache": _names(cache.dtype for cache in kv_caches),
        "kv_cache_setting": str(config.cache_config.cache_dtype),
        "device": sorted({p.device.type for p in parameters}),
    }
    return {**report_process(), "rank": int(worker.rank), "roles": {"rollout": fields}}


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    """The tensors in vLLM's ``kv_caches``: one a layer, or several in a list."""
    for item in nested:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from _tensors(item)


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _names(dtypes: Iterable[torch.dtype | None]) -> list[str]:
    return sorted({str(_name(dtype)) for dtype in dtypes})
