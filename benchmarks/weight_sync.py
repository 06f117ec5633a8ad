"""Bytes and time of a weight sync, float16 with our checks against verl's own float32, and what an audit adds.

    python benchmarks/weight_sync.py [--pairs 12] [--out benchmarks/results/weight_sync-cpu.json]

One process has two of verl's FSDP2 engines with the same weights, one of them with the flag, and sends through verl's
``BucketedWeightSender``, whose bucket has verl's default size; another one runs vLLM with verl's worker extension,
receives and loads. Syncs alternate, so that both see the same machine; what is given are medians of wall time, and of
the ratio of neighbours.

Threads that wait for each other do so asleep (``OMP_WAIT_POLICY=passive``, for both): vLLM's engine waits for its
worker in a busy loop, and on two cores spinning threads as well would make this a measurement of the scheduler.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "gpu")]
from off_cost import machine_facts, summary, write_result  # noqa: E402
from sync_part import Receiver  # noqa: E402

BUCKET_MB = 2048  # of address space; pages come as they are written
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
_HANDLE = "ipc:///tmp/rl-colocate-zmq-{job}-replica-0-rank-0.sock"


def make_model(folder: Path) -> int:
    """The quickstart's architecture with about 220 M parameters, random; returns their number."""
    import torch
    from transformers import Qwen3ForCausalLM

    from verl_fp16.quickstart.base_model import base_config
    from verl_fp16.quickstart.tokenizer import build_tokenizer

    config = base_config(build_tokenizer(folder))
    for name, value in SHAPE.items():
        setattr(config, name, value)
    config.layer_types = config.layer_types[:1] * config.num_hidden_layers
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def sync(engine, receiver: Receiver, job: str, audit: bool = False) -> float:
    """Seconds of one sync; with ``audit`` also of digests on both sides and of what the worker says."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    from verl_fp16.weight_sync.rank_calls import sender_of
    from verl_fp16.weight_sync.sender import Learned

    started = time.perf_counter()
    ours = sender_of(engine)
    if ours is not None:
        ours.prepare(digests=audit)
    if audit:
        receiver.ask("verl_fp16_begin_audit")
        receiver.answer()
    receiver.ask("update_weights_from_ipc")
    weights, _ = engine.get_per_tensor_param()
    sender = BucketedWeightSender(_HANDLE.format(job=job), BUCKET_MB, use_shm=True)
    asyncio.run(sender.async_send_weights(weights))
    receiver.answer()
    report = ours.report() if ours is not None else None
    if audit:
        from verl_fp16.weight_sync import audit as verdict

        receiver.ask("verl_fp16_end_audit", "float16")
        received = receiver.answer()
        faults = [*verdict.stream_faults([("rank 0", report)], [("worker", received)])]
        faults += verdict.holding_faults([("worker", received)])
        assert not faults, faults
        sync.learned = Learned(*(frozenset(names) for names in verdict.learned([("worker", received)]).values()))
    sync.bytes = report["bytes"] if report else None
    return time.perf_counter() - started


def measure(pairs: int, out: Path) -> None:
    import torch
    import torch.distributed as dist
    import verl  # noqa: F401

    from verl_fp16 import standalone
    from verl_fp16.weight_sync.rank_calls import sender_of

    job = f"benchmark{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        parameters = make_model(model)
        print(f"[weight_sync] {parameters / 1e6:.1f} M parameters", flush=True)
        receiver = Receiver(str(model), "cpu", job)
        dist.init_process_group("cpu:gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        flagged = standalone.build_engine(str(model), precision=standalone.mixed_precision("float16"))
        plain = standalone.build_engine(str(model), precision={"param_dtype": "fp16"})
        first = sync(flagged, receiver, job, audit=True)
        sender_of(flagged).learn(sync.learned)
        times: dict[str, list[float]] = {"float32, plain verl": [], "float16": [], "float16 audited": []}
        for index in range(pairs + 1):
            row = sync(plain, receiver, job), sync(flagged, receiver, job), sync(flagged, receiver, job, audit=True)
            print(f"[weight_sync] pair {index} of {pairs}: {[round(s, 3) for s in row]}", flush=True)
            for seconds, kept in zip(row, times.values(), strict=True):
                kept.append(seconds)
        sent = sync.bytes
        receiver.close()
        dist.destroy_process_group()
    native, ours, audited = (column[1:] for column in times.values())
    result = {
        **machine_facts(),
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "bytes": {"float32": 4 * parameters, "float16": sent, "ratio": sent / (4 * parameters)},
        "sync": _wall(native, ours),
        "audit": _wall(ours, audited),
        "first_audited_seconds": first,
    }
    write_result(result, out)
    print(json.dumps(result, indent=2))


def _wall(without: list[float], with_it: list[float]) -> dict:
    """``off_cost``'s summary, under the name of what was measured here."""
    found = summary(list(zip(without, with_it, strict=True)))
    return {name.replace("_cpu_", "_"): value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("outputs") / "weight_sync.json")
    options = parser.parse_args()
    os.environ |= {"VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29411",
    }
    measure(options.pairs, options.out)


if __name__ == "__main__":
    main()
