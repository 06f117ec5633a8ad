"""Hooks on vLLM's server and workers, as verl runs them: they answer the read-back."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

# Called by name, in vLLM's workers through its collective_rpc and on the server's Ray actor.
METHOD = "verl_fp16_report"


def worker_answers(module: ModuleType) -> Callable[[], None]:
    """Give the class that vLLM mixes into its worker a method that says what the worker runs."""

    def verl_fp16_report(self: Any) -> str:
        from verl_fp16.readback.rank import report_rollout_worker

        # What vLLM's queue cannot carry is lost in its engine core without an answer; text it can carry.
        return json.dumps(report_rollout_worker(self))

    return _add_method(module.vLLMColocateWorkerExtension, verl_fp16_report)


def server_answers(module: ModuleType) -> Callable[[], None]:
    """Give verl's vLLM server a method that says what it and its workers run; verl's own drops their answers."""

    async def verl_fp16_report(self: Any) -> dict[str, Any]:
        from verl_fp16.readback.rank import report_process

        # On the further nodes of a replica there is a server without an engine.
        workers = await ask_workers(self.engine) if self.node_rank == 0 else []
        return {"server": report_process(), "workers": workers}

    return _add_method(module.vLLMHttpServer, verl_fp16_report)


def _add_method(owner: type, method: Callable[..., Any]) -> Callable[[], None]:
    setattr(owner, METHOD, method)
    return lambda: delattr(owner, METHOD)


async def ask_workers(engine: Any) -> list[dict[str, Any]]:
    """The reports of all workers of vLLM's ``AsyncLLM``.

    Its own ``collective_rpc`` returns those of the first data-parallel shard only; the others are asked one by one.
    """
    client = engine.engine_core
    shards = getattr(client, "core_engines", ())
    if len(shards) < 2:
        said = [await engine.collective_rpc(METHOD)]
    else:
        ask = functools.partial(client._call_utility_async, "collective_rpc", METHOD, None, (), None)
        said = await asyncio.gather(*(ask(engine=shard) for shard in shards))
    return [json.loads(report) for reports in said for report in reports]
