"""What the facts of a short run of verl come to. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from verl_fp16.log_entries import SKIPPED
from verl_fp16.loss_scale_settings import FORWARD, GRADIENT, NORM
from verl_fp16.selftest.rows import FAIL, SKIP, Facts, Row, verdict

FLOAT16 = "float16"
GAP, K3, AUDIT, PROBE = (
    "mismatch/log_prob_abs_diff_mean",
    "mismatch/k3",
    "sync/audit_ok",
    "sync/probe_abs_diff",
)
MOST_GAP = {"small": 2e-3, "theirs": 1e-2}
"""Largest mean |d log p| of a step, in nats, of the model that is made here and of the user's.

The small one had 2e-4 to 4e-4 in float16 on a CPU; five times as much is not rounding. It is no check of the dtype,
which is read back: both sides in bfloat16 had 1.7e-3. Of models in use float16 has more, the k3 of published runs,
up to 1e-5, being a mean of up to 4e-3. Other weights or other tokens on one side make it tenths and more.
"""
_OF_TRAINING = {"autocast": FLOAT16, "fsdp_param": [FLOAT16]}


def run_rows(facts: Facts, steps: int) -> list[Row]:
    """The rows of a run that should have made ``steps`` steps; see :mod:`verl_fp16.selftest.run_stage`."""
    finished, logged = _finished(facts, steps), facts["steps"]
    rows = [finished, _dtypes(facts)]
    if not logged:
        return [*rows, *(Row(f"run: {name}", SKIP, "no step was logged") for name in ("weight sync", "gap", "skips"))]
    most = MOST_GAP["theirs" if facts["theirs"] else "small"]
    return [*rows, _audit(logged), _gap(logged, most), _skips(logged, facts["skips"])]


def _finished(facts: Facts, steps: int) -> Row:
    if facts["cause"]:
        return Row("run: finished", FAIL, " | ".join(line.strip() for line in facts["cause"].splitlines()))
    found = sorted(map(int, facts["steps"]))
    good = found == list(range(1, steps + 1))
    text = f"{steps} steps of GRPO with verl's trainer and the vLLM rollout"
    listed = ", ".join(map(str, found)) or "none"
    return verdict("run: finished", good, text, f"it ended without an error, and of {steps} steps it logged {listed}")


def _dtypes(facts: Facts) -> Row:
    name, read_back = "run: dtypes", facts["read_back"]
    if read_back is None:
        return Row(
            name, FAIL, "no process was asked what it computes in: the run ended before, or the flag had no effect"
        )
    wrong = [*read_back["differences"], *_not_float16(read_back["processes"])]
    counted = {role: 0 for role in ("actor", "rollout")}
    for _, role, _ in _roles(read_back["processes"]):
        counted[role] = counted.get(role, 0) + 1
    for role, word in (("actor", "actor ranks"), ("rollout", "rollout workers")):
        if counted[role] != facts["gpus"]:
            wrong.append(f"{counted[role]} of {facts['gpus']} {word} reported")
    told = ", ".join(f"{number} {role}" for role, number in counted.items())
    return verdict(name, not wrong, f"float16 in every process, read back: {told}", "; ".join(dict.fromkeys(wrong)))


def _roles(processes: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(process in words, role, its fields)."""
    for process in processes:
        for role, fields in ((process["report"] or {}).get("roles") or {}).items():
            yield process["who"], role, fields


def _not_float16(processes: Any) -> Iterator[str]:
    for who, role, fields in _roles(processes):
        if role == "rollout":
            if fields["model_dtype"] != FLOAT16:
                yield f"{role} ({who}): vLLM's dtype is {fields['model_dtype']}"
            # Some small parameters are float32 on purpose.
            if FLOAT16 not in fields["parameters"] or not set(fields["parameters"]) <= {FLOAT16, "float32"}:
                yield f"{role} ({who}): vLLM's parameters are {'/'.join(fields['parameters'])}"
            continue
        for field, wanted in _OF_TRAINING.items():
            if fields[field] != wanted:
                found = fields[field]
                yield f"{role} ({who}): {field} is {'/'.join(found) if isinstance(found, list) else found}"


def _audit(steps: Mapping[str, Mapping[str, float]]) -> Row:
    """Each step's, as the first sync sends float32 and only the later ones float16."""
    without = [step for step, data in steps.items() if AUDIT not in data]
    failed = [step for step, data in steps.items() if data.get(AUDIT, 1) != 1]
    wrong = [f"the audit failed in step {', '.join(failed)}"] if failed else []
    wrong += [f"no audit in step {', '.join(without)}: {AUDIT} was not logged"] if without else []
    good = f"what the actor sent arrived to the bit, audited in each of {len(steps)} steps"
    apart = [data.get(PROBE, math.nan) for data in steps.values()]
    if all(map(math.isfinite, apart)):
        good += f"; the log-probabilities of a probe are {max(apart):.1e} nats apart"
    else:
        good += "; the log-probabilities of a probe could not be compared in every step"
    return verdict("run: weight sync", not wrong, good, "; ".join(wrong))


def _gap(steps: Mapping[str, Mapping[str, float]], most: float) -> Row:
    wrong = [complaint for step, data in steps.items() for complaint in _of_gap(f"step {step}", data, most)]
    if wrong:
        return Row("run: gap", FAIL, "; ".join(wrong))
    mean = sum(data[GAP] for data in steps.values()) / len(steps)
    return verdict("run: gap", True, f"mean |d log p| {mean:.2e} nats, rollout and training in float16", "")


def _of_gap(step: str, data: Mapping[str, float], most: float) -> Iterator[str]:
    for side in ("train", "rollout"):
        if data.get(f"mismatch/{side}_dtype/{FLOAT16}") != 1:
            others = [key.rpartition("/")[2] for key in data if key.startswith(f"mismatch/{side}_dtype/")]
            others = [other for other in others if other != FLOAT16]
            yield f"{step}: {side} is in {', '.join(others) or 'no dtype that was logged'}"
    for name in (GAP, K3):
        if not math.isfinite(data.get(name, math.nan)):
            yield f"{step}: {name} is {'not finite' if name in data else 'missing'}"
    if data.get(GAP, 0.0) > most:
        yield f"{step}: mean |d log p| {data[GAP]:.2e} nats, more than {most:.1e}: both sides do not compute the same"


def _skips(steps: Mapping[str, Mapping[str, float]], records: list[Mapping[str, Any]]) -> Row:
    name = "run: skips"
    if any(SKIPPED not in data for data in steps.values()):
        return Row(name, FAIL, f"{SKIPPED} was not logged: no loss scaler decided the updates")
    skipped = int(sum(data[SKIPPED] for data in steps.values()))
    cured = [record for record in records if record["kind"] == GRADIENT and record["gradients"]]
    wrong = [f"update {one['update']}: {_cause(one)}" for one in records if one not in cured]
    if skipped != len(records):
        wrong.insert(0, f"{skipped} updates were skipped, and {len(records)} recorded with a cause")
    told = ", ".join(dict.fromkeys(f"{one['gradients'][0]['parameter']} under {one['scale']:g}" for one in cured))
    good = (
        f"{skipped} skipped while the loss scale was found, gradients overflowed: {told}"
        if cured
        else "no update was skipped"
    )
    return verdict(name, not wrong, good, "; ".join(wrong))


def _cause(record: Mapping[str, Any]) -> str:
    causes = {
        FORWARD: "the loss or an output of the forward pass was not finite, which no loss scale cures",
        NORM: "the gradients are finite, their norm is not",
    }
    return causes.get(record["kind"], "no gradient was found that overflowed")
