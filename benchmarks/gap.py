"""The training-inference gap of each precision pair on the same tokens, teacher-forced through both real sides.

    python benchmarks/gap.py MODEL [--answers 4096] [--out outputs/gap.json]

The README's table is made from ``benchmarks/results/gap-cpu.json`` (``scripts/readme_tables.py``).

Rollout side: vLLM scores the tokens (``prompt_logprobs``) with the model loaded in its dtype. Training side: verl's
FSDP engine, FP32 master weights, autocast and FSDP parameters in its dtype, the pass that computes old log-probs.
Tokens: answers that an FP32 copy of the model samples at temperature 1 to written sums; only tokens at which the
model's FP32 entropy is at least the floor count, because a token that is certain has no gap in any precision.

Intervals: 95%, bootstrap over answers, with the same resamples for every pair.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

PAIRS = {
    # name: (training side, rollout dtype)
    "fp16": ("float16", "float16"),
    "bf16": ("bfloat16", "bfloat16"),
    "documented keys (fsdp_config.dtype=float16, rollout.dtype=float16)": ("documented", "float16"),
    "fp32": ("float32", "float32"),
}
ENTROPY_FLOOR = 0.1
RESAMPLES = 2000
MICRO_BATCH = 64


def sample(model_path: str, out: str, answers: int) -> None:
    """Write prompts with sampled answers, and the FP32 entropy at each answer token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from verl_fp16.quickstart.task import split_sums

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    split = split_sums(1)
    sums = [*split.held_out, *split.train]
    by_length: dict[int, list[list[int]]] = {}
    for index in range(answers):
        messages = sums[index % len(sums)].messages
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        by_length.setdefault(len(ids), []).append(ids)
    rows = []
    with torch.no_grad():
        for prompts in by_length.values():
            for start in range(0, len(prompts), 256):
                rows += _sample_rows(model, torch.tensor(prompts[start : start + 256]), tokenizer.eos_token_id)
    torch.save(rows, out)


def _sample_rows(model, ids, eos: int) -> list:
    import torch

    length, entropies, alive = ids.shape[1], [], torch.ones(len(ids), dtype=torch.bool)
    lengths = torch.zeros(len(ids), dtype=torch.long)
    for _ in range(8):
        logits = model(ids).logits[:, -1]
        log_probs = torch.log_softmax(logits, -1)
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
        token = torch.multinomial(log_probs.exp(), 1)
        ids = torch.cat([ids, token], dim=1)
        lengths += alive
        alive &= token[:, 0] != eos
        if not alive.any():
            break
    entropy = torch.stack(entropies, dim=1)
    rows = zip(ids, lengths, entropy, strict=True)
    return [(row[: length + n].tolist(), length, values[:n].tolist()) for row, n, values in rows]


def score_training(model_path: str, rows_path: str, out: str, side: str) -> None:
    """Answer log-probs by verl's FSDP engine; ``documented`` is what verl makes of its documented FP16 keys."""
    import torch
    import torch.distributed as dist
    import verl  # noqa: F401

    from verl_fp16 import standalone

    dist.init_process_group("cpu:gloo", init_method=f"file://{out}.store", rank=0, world_size=1)
    documented = side == "documented"
    engine = standalone.build_engine(
        model_path,
        precision=None if documented else standalone.mixed_precision(side),
        engine={"dtype": "float16"} if documented else {},
    )
    rows = torch.load(rows_path)
    padded = rows + rows[: -len(rows) % MICRO_BATCH]
    log_probs = standalone.teacher_forced_log_probs(engine, [ids for ids, _, _ in padded], MICRO_BATCH)
    kept = [scores[start - 1 :] for scores, (_, start, _) in zip(log_probs, rows, strict=False)]  # without the padding
    torch.save({"log_probs": kept, "autocast": str(engine._autocast_dtype)}, out)


def score_rollout(model_path: str, rows_path: str, out: str, dtype: str) -> None:
    """Answer log-probs by vLLM with the model in ``dtype``."""
    import torch
    from vllm import LLM, SamplingParams

    rows = torch.load(rows_path)
    llm = LLM(
        model_path, dtype=dtype, enforce_eager=True, max_model_len=64, enable_prefix_caching=False, max_num_seqs=128
    )
    prompts = [{"prompt_token_ids": ids} for ids, _, _ in rows]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    kept = [
        torch.tensor([output.prompt_logprobs[p][ids[p]].logprob for p in range(start, len(ids))])
        for output, (ids, start, _) in zip(outputs, rows, strict=True)
    ]
    torch.save({"log_probs": kept, "dtype": str(llm.llm_engine.model_config.dtype)}, out)


def _run(step: str, *arguments: str) -> None:
    env = {**os.environ, "VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    print(f"[gap] {step} {arguments[-1]}", flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--step", step, *arguments], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{step} {arguments[-1]} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def compare(rows: list, training: dict, rollout: dict) -> dict:
    """Gap of every pair with intervals, and the factors between BF16 and the others."""
    import torch

    floor = [torch.tensor(entropy) >= ENTROPY_FLOOR for _, _, entropy in rows]
    counts = torch.stack([keep.sum() for keep in floor]).double()
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(rows), (RESAMPLES, len(rows)), generator=generator)
    result, samples = {}, {}
    for name, (train_side, rollout_side) in PAIRS.items():
        sums = torch.zeros(len(rows), 2, dtype=torch.float64)
        for i, keep in enumerate(floor):
            d = (rollout[rollout_side]["log_probs"][i].double() - training[train_side]["log_probs"][i].double())[keep]
            sums[i, 0], sums[i, 1] = d.abs().sum(), (torch.expm1(-d) + d).sum()
        boot = sums[picks].sum(1) / counts[picks].sum(1, keepdim=True)
        samples[name] = boot
        means = sums.sum(0) / counts.sum()
        result[name] = {
            "training_autocast": training[train_side]["autocast"],
            "rollout_dtype": rollout[rollout_side]["dtype"],
            "mean_abs_dlogp": _with_interval(means[0], boot[:, 0]),
            "k3": _with_interval(means[1], boot[:, 1]),
        }
    factors = {}
    for name in PAIRS:
        if name not in ("bf16", "fp32"):
            ratio = samples["bf16"] / samples[name]
            factors[f"bf16 over {name}"] = {
                key: _with_interval(result["bf16"][key]["mean"] / result[name][key]["mean"], ratio[:, column])
                for column, key in enumerate(("mean_abs_dlogp", "k3"))
            }
    return {"tokens": int(counts.sum()), "pairs": result, "factors": factors}


def _with_interval(mean, samples) -> dict:
    low, high = samples.quantile(0.025).item(), samples.quantile(0.975).item()
    return {"mean": float(mean), "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=("sample", "training", "rollout"), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", metavar="MODEL", help="folder of the quickstart's base model")
    parser.add_argument("--answers", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path("outputs") / "gap.json")
    options = parser.parse_args()
    if options.step:
        model, *rest = options.arguments
        steps = {"sample": sample, "training": score_training, "rollout": score_rollout}
        steps[options.step](model, *(int(r) if r.isdigit() else r for r in rest))
        return
    if len(options.arguments) != 1 or not Path(options.arguments[0], "config.json").is_file():
        parser.error("MODEL must be one folder with a config.json, for example outputs/quickstart/model")
    measure(str(Path(options.arguments[0]).resolve()), options.answers, options.out)


def measure(model: str, answers: int, out: Path) -> None:
    """Sample, score on every side, compare, print and write."""
    import importlib.metadata as metadata

    import torch

    with tempfile.TemporaryDirectory() as folder:
        rows_path = f"{folder}/rows.pt"
        _run("sample", model, rows_path, str(answers))
        training, rollout = {}, {}
        for side in dict.fromkeys(pair[0] for pair in PAIRS.values()):
            _run("training", model, rows_path, f"{folder}/training-{side}.pt", side)
            training[side] = torch.load(f"{folder}/training-{side}.pt")
        for dtype in dict.fromkeys(pair[1] for pair in PAIRS.values()):
            _run("rollout", model, rows_path, f"{folder}/rollout-{dtype}.pt", dtype)
            rollout[dtype] = torch.load(f"{folder}/rollout-{dtype}.pt")
        rows = torch.load(rows_path)
    entropy = torch.cat([torch.tensor(values) for _, _, values in rows])
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("torch", "verl", "vllm-cpu", "transformers")},
        "answers": len(rows),
        "answer_tokens": entropy.numel(),
        "mean_entropy_nats": entropy.mean().item(),
        "entropy_floor_nats": ENTROPY_FLOOR,
        **compare(rows, training, rollout),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    for name, pair in result["pairs"].items():
        gap, k3_ = pair["mean_abs_dlogp"], pair["k3"]
        print(
            f"{name}: train {pair['training_autocast']}, rollout {pair['rollout_dtype']}: mean |dlogp| "
            f"{gap['mean']:.3e} [{gap['low']:.3e}, {gap['high']:.3e}], k3 {k3_['mean']:.3e} "
            f"[{k3_['low']:.3e}, {k3_['high']:.3e}]"
        )
    for name, factor in result["factors"].items():
        print(name, {key: [round(v, 2) for v in value.values()] for key, value in factor.items()})
    print(f"written to {out}")


if __name__ == "__main__":
    main()
