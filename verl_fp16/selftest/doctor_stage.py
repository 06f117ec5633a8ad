"""The doctor's look at this machine and environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from verl_fp16.doctor.examination import examine


def run(spec: dict[str, Any], tell: Callable[[str], object]) -> dict[str, Any]:
    """Facts: ``device`` (gpu or cpu) and ``checks``, the doctor's rows.

    Args:
        spec: nothing of it is read.
        tell: is told what is looked at.
    """
    found = examine(announce=tell)
    return {"device": found.device, "checks": [asdict(check) for check in found.checks]}
