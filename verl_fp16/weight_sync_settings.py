"""Settings of the weight sync: names, defaults, meaning and valid range. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from verl_fp16.findings import SettingsError

OVERFLOW_POLICIES = ("error", "clamp", "ignore")


@dataclass(frozen=True)
class WeightSyncSettings:
    """How the actor's weights come into the rollout, and how closely that is watched.

    Args:
        on_overflow: what becomes of a weight that is too large for the rollout's dtype (65,520 and more in float16):
            ``error`` stops the run before anything is rolled out with it, ``clamp`` sends the largest number instead,
            ``ignore`` sends inf. Exports follow it too.
        audit_interval: after the first sync, which is always audited, every so many syncs are; 0 for no more. >= 0.
        probe_tolerance: largest mean difference between the log-probabilities of the actor and of the rollout for the
            tokens of the audit's probe, in nats; > 0. Ten times as much is allowed where either side is bfloat16.

    Raises:
        SettingsError: naming every field that is wrong.
    """

    on_overflow: str = "error"
    audit_interval: int = 50
    probe_tolerance: float = 0.05

    def __post_init__(self) -> None:
        complaints = [f"sync.{name} {complaint}" for name, complaint in sync_complaints(vars(self))]
        if complaints:
            raise SettingsError("; ".join(complaints))


def sync_complaints(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The wrong fields of a complete mapping of these settings, each with what it has to be."""
    if values["on_overflow"] not in OVERFLOW_POLICIES:
        yield "on_overflow", f"must be {' or '.join(OVERFLOW_POLICIES)}, got {values['on_overflow']!r}"
    interval = values["audit_interval"]
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 0:
        yield "audit_interval", f"must be a number of syncs, or 0 for the first one only, got {interval!r}"
    tolerance = values["probe_tolerance"]
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not (number and 0 < tolerance < math.inf):
        yield "probe_tolerance", f"must be a finite number of nats above 0, got {tolerance!r}"
