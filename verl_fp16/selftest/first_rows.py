"""What the doctor's look and the making of the model come to. Plain Python."""

from __future__ import annotations

from verl_fp16.doctor.check import ERROR, WARNING
from verl_fp16.selftest.rows import FAIL, Facts, Row, verdict


def doctor_rows(facts: Facts) -> list[Row]:
    """One row: whether a run would start, each error named."""
    errors = [f"{one['name']}: {one['found']}" for one in facts["checks"] if one["status"] == ERROR]
    warnings = [one["name"] for one in facts["checks"] if one["status"] == WARNING]
    good = f"a run would start on a {facts['device'].upper()}"
    if warnings:
        good += f"; warnings of verl-fp16 doctor: {', '.join(warnings)}"
    return [verdict("doctor", not errors, good, f"a run would not start: {'; '.join(errors)}")]


def model_rows(facts: Facts) -> list[Row]:
    """One row: what is run."""
    if "failed" in facts:
        return [Row("model", FAIL, facts["failed"])]
    small = f"a Qwen3 of {facts['parameters'] / 1e6:.1f} M parameters, made here"
    theirs = facts["theirs"]
    return [verdict("model", True, f"{theirs} for run and gap; {small}, for engine" if theirs else small, "")]
