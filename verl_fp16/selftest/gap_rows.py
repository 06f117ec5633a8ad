"""What the gap of BF16 and of FP16 on the same tokens comes to, and their speed. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verl_fp16.selftest.rows import FAIL, PASS, SKIP, Facts, Row, verdict

WORDS = {"log_prob_abs_diff_mean": "|d log p|", "k3": "k3"}
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
ENOUGH_TOKENS = 500
"""Fewer cannot tell the precisions apart with certainty."""
LEAST_RATIO = 0.8
"""Of FP16's speed to BF16's, on a GPU."""
LEAST_SECONDS = 3.0
"""What was timed for a shorter time, all passes together, is not told to be slow."""
_SIDES = {"rollout": "rollout", "training": "log-prob pass"}


def gap_rows(facts: Facts) -> list[Row]:
    """The rows of the gap; see :mod:`verl_fp16.selftest.gap_stage`."""
    if "failed" in facts:
        return [Row("gap", FAIL, facts["failed"])]
    measured = facts["measurements"]
    return [_dtypes(measured), *(_gap(name, word, measured) for name, word in WORDS.items())]


def _dtypes(measured: Mapping[str, Facts]) -> Row:
    wrong = []
    for name, one in measured.items():
        wanted, found = DTYPES[name], one["found"]
        told = {
            "rollout": found.get("rollout", []),
            "autocast": [found.get("training", {}).get("autocast")],
            "FSDP's parameters": found.get("training", {}).get("weights", []),
        }
        # vLLM keeps some small parameters in float32 on purpose.
        others = {side: [t for t in types if t not in (wanted, "float32")] or None for side, types in told.items()}
        wrong += [f"{name}: {side} is {types}" for side, types in others.items() if types]
        wrong += [f"{name}: {side} is not {wanted}" for side, types in told.items() if wanted not in types]
    return verdict("gap: dtypes", not wrong, "each precision is what both sides computed in", "; ".join(wrong))


def _gap(name: str, word: str, measured: Mapping[str, Facts]) -> Row:
    bf16, fp16 = measured["bf16"][name], measured["fp16"][name]
    tokens = min(measured["bf16"]["tokens"], measured["fp16"]["tokens"])
    both = f"FP16 {_interval(fp16)}, BF16 {_interval(bf16)}, {tokens:,} tokens"
    title = f"gap: {word}"
    if fp16["high"] < bf16["low"]:
        return Row(title, PASS, f"{both}: {bf16['value'] / fp16['value']:.1f} times smaller" if fp16["value"] else both)
    if tokens < ENOUGH_TOKENS:
        return Row(title, SKIP, f"too few tokens to tell: {both}. Give more prompts with --prompts")
    return Row(title, FAIL, f"FP16's interval does not lie below BF16's: {both}")


def _interval(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.2e} [{found['low']:.1e}, {found['high']:.1e}]"


def throughput_rows(facts: Facts) -> list[Row]:
    """The rows of FP16's speed over BF16's; on a CPU for information."""
    if "failed" in facts:
        return [Row("throughput", SKIP, "the stage gap gave no numbers")]
    rows = [
        _speed(f"throughput: {word}", facts["speeds"].get(side, {}), facts["device"]) for side, word in _SIDES.items()
    ]
    if facts["device"] == "gpu" and facts["token_loop"]:
        rows[-1] = _of_a_loop(rows[-1])
    return rows


def _of_a_loop(row: Row) -> Row:
    why = "not to be told: without flash-attn verl takes log-probabilities in a loop over tokens, slow in any precision"
    return Row(row.name, SKIP, f"{why}: {row.reason}")


def _speed(name: str, speeds: Mapping[str, Facts], device: str) -> Row:
    if set(speeds) != set(DTYPES):
        missing = ", ".join(sorted(set(DTYPES) - set(speeds)))
        return Row(name, SKIP, f"not timed: {missing}")
    rates = {one: speeds[one]["tokens"] / speeds[one]["seconds"] for one in DTYPES}
    ratio = rates["fp16"] / rates["bf16"]
    told = f"FP16 {rates['fp16']:,.0f} tokens/s, BF16 {rates['bf16']:,.0f}: {ratio:.2f} times"
    if device == "cpu":
        return Row(name, PASS, f"{told} (for information: vLLM and torch have no fast FP16 on most CPUs)")
    if ratio < LEAST_RATIO and _least_seconds(list(speeds.values())) < LEAST_SECONDS:
        return Row(name, SKIP, f"too short to tell: {told}. Name a larger model with --model")
    return verdict(name, ratio >= LEAST_RATIO, told, f"slower than {LEAST_RATIO:g} times BF16: {told}")


def _least_seconds(speeds: Sequence[Facts]) -> float:
    return min(speed["timed_s"] for speed in speeds)
