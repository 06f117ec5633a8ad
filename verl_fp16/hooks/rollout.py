"""Hooks on vLLM's server and workers, as verl runs them: they answer the read-back and the weight sync's audit.

vLLM's queue loses an answer that it cannot carry; text it can, so workers answer in JSON.
"""

from __future__ import annotations

import asyncio
import functools
import json
import uuid
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

# Called by name, in vLLM's workers through its collective_rpc and on the server's Ray actor.
METHOD = "verl_fp16_report"
BEGIN_AUDIT, END_AUDIT = "verl_fp16_begin_audit", "verl_fp16_end_audit"


def worker_answers(module: ModuleType) -> Callable[[], None]:
    """Give the class that vLLM mixes into its worker methods that say what the worker runs and holds.

    A wrap of ``_update_weights`` comes with them, and not from a hook of its own: the module is there only beside vLLM.
    """

    def verl_fp16_report(self: Any) -> str:
        from verl_fp16.readback.rank import report_rollout_worker

        return json.dumps(report_rollout_worker(self))

    def verl_fp16_begin_audit(self: Any) -> str:
        from verl_fp16.weight_sync.receiver import WeightReceiver

        self._verl_fp16_receiver = WeightReceiver(lambda: load_targets(self))
        return json.dumps({})

    def verl_fp16_end_audit(self: Any, dtype: str) -> str:
        import torch

        receiver = self.__dict__.pop("_verl_fp16_receiver")
        return json.dumps({"rank": int(self.rank), **receiver.report(getattr(torch, dtype))})

    owner = module.vLLMColocateWorkerExtension
    take_methods_out = _add_methods(owner, verl_fp16_report, verl_fp16_begin_audit, verl_fp16_end_audit)
    original = owner._update_weights
    owner._update_weights = _noting_arrival(original)

    def undo() -> None:
        owner._update_weights = original
        take_methods_out()

    return undo


def _noting_arrival(update: Callable[..., None]) -> Callable[..., None]:
    """On audited syncs, have a receiver digest what arrived and watch it being loaded."""

    @functools.wraps(update)
    def _update_weights(self: Any, weights: Any, *args: Any, **kwargs: Any) -> None:
        receiver = getattr(self, "_verl_fp16_receiver", None)
        if receiver is None:
            return update(self, weights, *args, **kwargs)
        weights = list(weights)
        return receiver.load(weights, lambda: update(self, weights, *args, **kwargs))

    return _update_weights


def load_targets(worker: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of everything that a sync writes in a vLLM worker: parameters, buffers, slots of LoRA layers."""
    for index, model in enumerate(worker._iter_all_models()):
        prefix = f"drafter {index}: " if index else ""
        for name, tensor in (*model.named_parameters(), *model.named_buffers(), *_lora_slots(model)):
            yield prefix + name, tensor


def _lora_slots(model: Any) -> Iterator[tuple[str, Any]]:
    """vLLM's LoRA layers keep the adapters in plain attributes: tuples of tensors with a slot for each adapter."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if "lora" in attribute and attribute.endswith("_stacked"):
                slots = value if isinstance(value, list | tuple) else (value,)
                yield from ((f"{name}.{attribute}.{i}", slot) for i, slot in enumerate(slots))


def server_answers(module: ModuleType) -> Callable[[], None]:
    """Give verl's vLLM server methods that say what it and its workers run and hold; verl's own drop the answers."""

    async def verl_fp16_report(self: Any) -> dict[str, Any]:
        from verl_fp16.readback.rank import report_process

        # On the further nodes of a replica there is a server without an engine.
        workers = await ask_workers(self.engine) if self.node_rank == 0 else []
        return {"server": report_process(), "workers": workers}

    async def verl_fp16_begin_audit(self: Any) -> list[dict[str, Any]]:
        return await ask_workers(self.engine, BEGIN_AUDIT) if self.node_rank == 0 else []

    async def verl_fp16_end_audit(self: Any, dtype: str) -> list[dict[str, Any]]:
        return await ask_workers(self.engine, END_AUDIT, dtype) if self.node_rank == 0 else []

    async def verl_fp16_probe(self: Any, token_ids: list[int]) -> list[float]:
        """Log-probabilities of all tokens but the first, given those before; of as many as fit into the context.

        Empty where the server takes no requests now, or cannot answer.
        """
        # verl's asynchronous modes sync between an abort and a resume: a request would wait for what comes after it.
        if getattr(self, "_submission_paused", False) or _skips_prompts(self.engine):
            return []
        fitting = token_ids[: self.config.max_model_len - 1]
        asked = {"prompt_logprobs": 0, "max_tokens": 1, "temperature": 0.0}
        output = await self.generate(fitting, asked, request_id=f"verl_fp16-{uuid.uuid4().hex}")
        # verl appends a dummy for the token that is generated; an aborted request has none of this.
        return [row[0] for row in output.extra_fields.get("prompt_logprobs", ())[:-1]]

    return _add_methods(
        module.vLLMHttpServer, verl_fp16_report, verl_fp16_begin_audit, verl_fp16_end_audit, verl_fp16_probe
    )


def _skips_prompts(engine: Any) -> bool:
    """Whether vLLM leaves out layers for a prompt's tokens: asked for their log-probabilities, it fails as a whole."""
    cache = getattr(getattr(engine, "vllm_config", None), "cache_config", None)
    return bool(getattr(cache, "kv_sharing_fast_prefill", False))


def _add_methods(owner: type, *methods: Callable[..., Any]) -> Callable[[], None]:
    for method in methods:
        setattr(owner, method.__name__, method)

    def undo() -> None:
        for method in methods:
            delattr(owner, method.__name__)

    return undo


async def ask_workers(engine: Any, method: str = METHOD, *args: Any) -> list[dict[str, Any]]:
    """The answers of all workers of vLLM's ``AsyncLLM`` to one of our methods.

    Its own ``collective_rpc`` returns those of the first data-parallel shard only; the others are asked one by one.
    """
    client = engine.engine_core
    shards = getattr(client, "core_engines", ())
    if len(shards) < 2:
        said = [await engine.collective_rpc(method, args=args)]
    else:
        ask = functools.partial(client._call_utility_async, "collective_rpc", method, None, args, None)
        said = await asyncio.gather(*(ask(engine=shard) for shard in shards))
    return [json.loads(report) for reports in said for report in reports]
