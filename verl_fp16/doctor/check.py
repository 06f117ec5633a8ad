"""One row of the doctor's report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Check:
    """What was looked at and what came out.

    Args:
        name: what was looked at.
        status: ``ok``, ``warning`` (a run starts, but look at it) or ``error`` (a run with the flag would not start).
        found: what is there.
        wanted: what should be there.
        fix: what to do; "" where nothing is to be done.
    """

    name: str
    status: str
    found: str
    wanted: str = ""
    fix: str = ""


def would_start(checks: Iterable[Check]) -> bool:
    """Whether no check is an error."""
    return all(check.status != ERROR for check in checks)
