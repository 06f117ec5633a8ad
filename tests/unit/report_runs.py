"""Logs and evidence made by hand for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from evidence_samples import FACTS, written

from verl_fp16.run_report.assemble import Run, load
from verl_fp16.run_report.places import find_runs

METRICS: dict[str, float] = {
    "critic/score/mean": 0.5,
    "actor/entropy": 0.4,
    "response_length/mean": 100.0,
    "mismatch/log_prob_abs_diff_mean": 4e-4,
    "mismatch/log_prob_abs_diff_p99": 5e-3,
    "mismatch/k3": 1e-6,
    "mismatch/slope_per_1k_tokens": -0.07,
    "mismatch/prob_abs_diff_mean": 2e-4,
    "mismatch/alarms": 0.0,
    "mismatch/train_dtype/float16": 1.0,
    "mismatch/rollout_dtype/float16": 1.0,
    "actor/loss_scale": 65536.0,
    "actor/skipped_steps": 0.0,
    "actor/skipped_total": 0.0,
    "actor/consecutive_skips": 0.0,
    "actor/grad_norm": 1.25,
    "timing_s/step": 10.0,
}


def entry(step: int, data: dict[str, Any]) -> str:
    return json.dumps({"step": step, "data": data}) + "\n"


def write_log(path: Path, steps: Iterable[int] = range(1, 4), **of_step: Callable[[int], Any]) -> Path:
    """A log with :data:`METRICS`; ``of_step`` changes those whose last part it names, and None leaves one out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {name.split("/", 1)[1].replace("/", "_"): name for name in METRICS}
    with open(path, "w") as file:
        for step in steps:
            data = {**METRICS, **{names[key]: value(step) for key, value in of_step.items()}}
            file.write(entry(step, {name: value for name, value in data.items() if value != "leave out"}))
    return path


def loaded(path: Path, *evidence: str) -> Run:
    (place,) = find_runs([str(path)], evidence)
    return load(place)


def write_evidence(folder: Path, step: int, *alarms: str, tokens: tuple = (), scalars: dict | None = None) -> Path:
    """As a run writes it into ``trainer.default_local_dir``."""
    facts = {**FACTS, "alarms": list(alarms), "scalars": scalars if scalars is not None else {"mismatch/k3": 1e-6}}
    return written(folder / "verl_fp16" / "mismatch", step, *tokens, facts=facts, alarm=bool(alarms))


def alarm(step: int, rule: str = "k3_jump") -> str:
    return (
        f"step {step}: mismatch/k3 is 6e-06 (2e-06 -> 6e-06; the rule is verl_fp16.mismatch.alarm_{rule}). "
        "What to do: find what changed; see in which tokens with `verl-fp16 tokens FILE`"
    )
