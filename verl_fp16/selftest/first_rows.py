"""What the doctor's look and the making of the model come to. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence

from verl_fp16.doctor.check import ERROR, WARNING
from verl_fp16.selftest.rows import FAIL, Facts, Row, verdict


def device_row(device: str, names: Sequence[str], gpus: int, unseen: str, hidden_by: str) -> Row:
    """What is tested, which nobody has to guess from the other rows.

    Args:
        device: gpu or cpu.
        names: of the GPUs that torch sees.
        gpus: how many of them are tested.
        unseen: why there is a GPU that is not tested; "" where there is none.
        hidden_by: the variable that hides all GPUs; "" where none does.
    """
    if device == "gpu":
        told = f"GPU: {gpus} of {len(names)}, {', '.join(dict.fromkeys(names))}"
    else:
        told = f"CPU: the GPUs are hidden by {hidden_by}" if hidden_by else "CPU: there is no GPU"
    return verdict("device", not unseen, told, unseen)


def doctor_rows(facts: Facts, device: str) -> list[Row]:
    """One row: whether a run would start, each error named.

    Args:
        device: gpu or cpu, whichever is tested.
    """
    errors = [f"{one['name']}: {one['found']}" for one in facts["checks"] if one["status"] == ERROR]
    warnings = [one for one in facts["checks"] if one["status"] == WARNING]
    # It is often why the others are as they are.
    of_device = [f"device: {one['found']} ({one['fix']})" for one in warnings if one["name"] == "device"]
    if facts["device"] != device:
        errors.insert(
            0, f"the self-test saw a {device.upper()} before, the doctor a {facts['device'].upper()}: try again"
        )
    good = "; ".join([f"a run would start on a {facts['device'].upper()}", *of_device])
    if others := [one["name"] for one in warnings if one["name"] != "device"]:
        good += f"; warnings of verl-fp16 doctor: {', '.join(others)}"
    return [verdict("doctor", not errors, good, f"a run would not start: {'; '.join([*of_device, *errors])}")]


def model_rows(facts: Facts) -> list[Row]:
    """One row: what is run."""
    if "failed" in facts:
        return [Row("model", FAIL, facts["failed"])]
    small = f"a Qwen3 of {facts['parameters'] / 1e6:.1f} M parameters, made here"
    theirs = facts["theirs"]
    return [verdict("model", True, f"{theirs} for run and gap; {small}, for engine" if theirs else small, "")]
