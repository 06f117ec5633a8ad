"""vLLM's part in the read-back: what its workers say, and that every data-parallel shard of an engine is asked."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch

from verl_fp16.hooks import rollout
from verl_fp16.readback import rank


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(rank, "report_process", lambda: {"host": "h", "pid": 1})
    model = torch.nn.Linear(2, 2, dtype=torch.float16)
    model.bias.data = model.bias.data.float()
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float16), cache_config=SimpleNamespace(cache_dtype="auto")
    )
    kv_caches = [torch.zeros(1, dtype=torch.float16), [torch.zeros(1, dtype=torch.bfloat16), None]]
    # With full CUDA graphs, vLLM's runner holds the model in a wrapper that passes attributes on.
    wrapper = type("CUDAGraphWrapper", (), {"__getattr__": lambda self, name: getattr(model, name)})()
    runner = SimpleNamespace(vllm_config=config, model=wrapper, get_model=lambda: model, kv_caches=kv_caches)
    return SimpleNamespace(rank=3, model_runner=runner)


def test_a_worker_says_what_its_live_tensors_are(worker):
    report = rank.report_rollout_worker(worker)
    assert report["rank"] == 3
    assert report["roles"]["rollout"] == {
        "model": "Linear",
        "model_dtype": "float16",
        "parameters": ["float16", "float32"],
        "kv_cache": ["bfloat16", "float16"],
        "kv_cache_setting": "auto",
        "device": ["cpu"],
    }


def test_the_workers_method_answers_in_text_and_is_taken_out_again(worker):
    loads = {"_update_weights": lambda self, weights, peft_config, base_sync_done: weights}
    module = SimpleNamespace(vLLMColocateWorkerExtension=type("Extension", (), dict(loads)))
    undo = rollout.worker_answers(module)
    text = module.vLLMColocateWorkerExtension.verl_fp16_report(worker)
    assert json.loads(text)["roles"]["rollout"]["model_dtype"] == "float16"
    undo()
    assert not [name for name in vars(module.vLLMColocateWorkerExtension) if name.startswith("verl_fp16")]
    assert module.vLLMColocateWorkerExtension._update_weights is loads["_update_weights"]


class Engine:
    """vLLM's AsyncLLM, as far as it is used: ``collective_rpc`` returns the first shard's answers."""

    def __init__(self, shards: int, method: str = "verl_fp16_report"):
        self.method = method
        self.engine_core = self
        self.core_engines = [f"shard{i}" for i in range(shards)]

    async def _call_utility_async(self, method, name, timeout, args, kwargs, *, engine):
        assert (method, name, kwargs) == ("collective_rpc", self.method, None)
        return [json.dumps({"shard": engine, "rank": rank, "args": args}) for rank in (0, 1)]

    async def collective_rpc(self, name, args=()):
        return await self._call_utility_async("collective_rpc", name, None, args, None, engine=self.core_engines[0])


@pytest.mark.parametrize("shards", (1, 3))
def test_every_worker_of_every_shard_is_asked(shards):
    said = asyncio.run(rollout.ask_workers(Engine(shards)))
    assert [(report["shard"], report["rank"]) for report in said] == [
        (f"shard{shard}", rank) for shard in range(shards) for rank in (0, 1)
    ]


@pytest.mark.parametrize("shards", (1, 3))
def test_arguments_reach_every_worker(shards):
    said = asyncio.run(rollout.ask_workers(Engine(shards, "verl_fp16_end_audit"), "verl_fp16_end_audit", "float16"))
    assert [report["args"] for report in said] == [["float16"]] * 2 * shards


def test_a_worker_outside_of_an_audit_loads_as_it_did():
    module = SimpleNamespace(vLLMColocateWorkerExtension=type("Extension", (), {"_update_weights": lambda self, w: w}))
    rollout.worker_answers(module)
    weights = [("a", object())]
    assert module.vLLMColocateWorkerExtension()._update_weights(weights) is weights


def test_the_probe_is_cut_to_the_context_and_leaves_out_verls_dummy():
    module = SimpleNamespace(vLLMHttpServer=type("vLLMHttpServer", (), {}))
    rollout.server_answers(module)
    server = module.vLLMHttpServer()
    server.config = SimpleNamespace(max_model_len=4)

    async def generate(prompt_ids, sampling_params, request_id):
        assert sampling_params == {"prompt_logprobs": 0, "max_tokens": 1, "temperature": 0.0}
        assert request_id.startswith("verl_fp16-")
        return SimpleNamespace(extra_fields={"prompt_logprobs": [[-float(i)] for i in prompt_ids[1:]] + [[0.0]]})

    server.generate = generate
    server.engine = SimpleNamespace()
    assert asyncio.run(server.verl_fp16_probe([5, 6, 7, 8, 9])) == [-6.0, -7.0]
    fast = SimpleNamespace(cache_config=SimpleNamespace(kv_sharing_fast_prefill=True))
    server.engine = SimpleNamespace(vllm_config=fast)
    assert asyncio.run(server.verl_fp16_probe([5, 6])) == [], "vLLM would fail as a whole"
    server.engine, server._submission_paused = SimpleNamespace(), True
    assert asyncio.run(server.verl_fp16_probe([5, 6])) == [], "a request would wait for the resume"


def test_an_aborted_probe_answers_nothing():
    module = SimpleNamespace(vLLMHttpServer=type("vLLMHttpServer", (), {}))
    rollout.server_answers(module)
    server = module.vLLMHttpServer()
    server.config, server.engine = SimpleNamespace(max_model_len=4), SimpleNamespace()

    async def generate(prompt_ids, sampling_params, request_id):
        return SimpleNamespace(extra_fields={"global_steps": 1})

    server.generate = generate
    assert asyncio.run(server.verl_fp16_probe([5, 6])) == []


def test_a_server_without_an_engine_answers_for_itself_alone(monkeypatch):
    monkeypatch.setattr(rank, "report_process", lambda: {"host": "h", "pid": 1})
    module = SimpleNamespace(vLLMHttpServer=type("vLLMHttpServer", (), {}))
    undo = rollout.server_answers(module)
    server = module.vLLMHttpServer()
    server.node_rank, server.engine = 0, Engine(1)
    said = asyncio.run(server.verl_fp16_report())
    assert (said["server"], len(said["workers"])) == ({"host": "h", "pid": 1}, 2)
    server.node_rank = 1
    assert asyncio.run(server.verl_fp16_report())["workers"] == []
    undo()
    assert not hasattr(module.vLLMHttpServer, "verl_fp16_report")
