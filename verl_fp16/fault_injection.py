"""Faults planted on purpose in training, for tests and drills: ``verl_fp16.fault_injection``. Plain Python.

Each fault makes a gradient or the loss non-finite on one rank in chosen updates::

    verl_fp16.fault_injection='[{role: actor, target: gradient, parameter: lm_head.weight, rank: 1, updates: [3, 4]}]'

A run with faults is refused unless ``VERL_FP16_ALLOW_FAULT_INJECTION=1`` is set where it is launched.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

ALLOW_VAR = "VERL_FP16_ALLOW_FAULT_INJECTION"
TARGETS = ("gradient", "loss")
VALUES = ("inf", "-inf", "nan")
TRAINED = ("actor", "critic")


class FaultInjectionError(RuntimeError):
    """A fault cannot be planted where its settings say; the message names the place."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        target: ``gradient``: the first element that the rank holds of the parameter's gradient, after the backward
            pass; ``loss``: the loss of the rank's first micro-batch.
        updates: the updates (mini-batches) in which it strikes, counted from 1 over resumed runs, skipped ones too.
        role: actor or critic.
        rank: the rank on which it strikes.
        parameter: name of the parameter in the model; for the target ``gradient``.
        value: inf, -inf or nan.
    """

    target: str
    updates: Sequence[int]
    role: str = "actor"
    rank: int = 0
    parameter: str = ""
    value: str = "inf"

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", str(self.value))  # YAML and Hydra make numbers of these words

    def strikes(self, rank: int, update: int) -> bool:
        """Whether it strikes on ``rank`` in ``update``."""
        return rank == self.rank and update in self.updates


def allowed() -> bool:
    """Whether the environment allows faults."""
    return os.environ.get(ALLOW_VAR, "").strip().lower() in ("1", "true", "yes", "on")


def fault_complaints(faults: Any) -> Iterator[tuple[str, Any, str]]:
    """What is wrong with a list of faults, as (place in it, value, complaint)."""
    if not isinstance(faults, Sequence) or isinstance(faults, str):
        yield "", faults, f"must be a list of faults, got {faults!r}"
        return
    known = [field.name for field in fields(Fault)]
    for index, fault in enumerate(faults):
        place = f"[{index}]"
        if not isinstance(fault, Mapping):
            yield place, fault, f"must be a mapping with {', '.join(known)}, got {fault!r}"
            continue
        for name in fault:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
                yield f"{place}.{name}", fault[name], f"is no key of a fault: {hint}"
        for name, complaint in _wrong_values(fault):
            yield f"{place}.{name}", fault.get(name), f"{complaint}, got {fault.get(name)!r}"


def _wrong_values(fault: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, choices in (("target", TARGETS), ("role", TRAINED), ("value", VALUES)):
        if str(fault.get(name, getattr(Fault, name, None))) not in choices:
            yield name, f"must be {' or '.join(choices)}"
    updates = fault.get("updates")
    if not isinstance(updates, Sequence) or isinstance(updates, str) or not all(map(_is_count, updates)) or not updates:
        yield "updates", "must be a list of updates, counted from 1"
    rank = fault.get("rank", 0)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        yield "rank", "must be a rank, from 0 on"
    parameter = fault.get("parameter", "")
    if not isinstance(parameter, str):
        yield "parameter", "must be the name of a parameter"
    elif (fault.get("target") == "gradient") != bool(parameter):
        yield "parameter", "must name a parameter for the target gradient, and only for it"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
