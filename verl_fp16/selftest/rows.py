"""One row of the self-test's table. Plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"

Facts = Mapping[str, Any]
"""What a stage found: plain types, as JSON has them."""


@dataclass(frozen=True)
class Row:
    """What was tested and what came out.

    Args:
        name: what was tested, the stage's name first.
        status: ``PASS``, ``FAIL`` or ``SKIP`` (not tested, or not to be told).
        reason: why, with the numbers.
        seconds: what the stage took that the row is of; None where it was not run.
        log: the file with what that stage said, in the output folder; "" where there is none.
    """

    name: str
    status: str
    reason: str
    seconds: float | None = None
    log: str = ""


def verdict(name: str, good: bool, passed: str, failed: str) -> Row:
    """A row with the reason that goes with its status."""
    return Row(name, PASS if good else FAIL, passed if good else failed)


def exit_code(rows: Iterable[Row]) -> int:
    """0 where no row failed, otherwise 1."""
    return int(any(row.status == FAIL for row in rows))
