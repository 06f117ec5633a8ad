"""The audit's verdict, in the trainer's process: what was sent, what arrived, what is held, and what it computes.

Plain Python. A sender's report is :meth:`~verl_fp16.weight_sync.sender.WeightSender.report`'s, a receiver's
:meth:`~verl_fp16.weight_sync.receiver.WeightReceiver.report`'s.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

_LISTED = 8

Named = Sequence[tuple[str, Mapping[str, Any]]]
"""(who, report) of several processes."""


class WeightSyncError(RuntimeError):
    """The rollout does not hold, or does not compute with, the weights that were trained."""


def stream_faults(senders: Named, receivers: Named) -> Iterator[str]:
    """Streams that are not the one of the first sender: every rank gathers the whole, so all have to be equal."""
    if not senders:
        return
    first, reference = senders[0][0], _by_name(senders[0][1])
    for who, report in (*senders[1:], *receivers):
        yield from _stream_differences(first, reference, who, _by_name(report))


def _by_name(report: Mapping[str, Any]) -> dict[str, tuple]:
    return {name: (dtype, tuple(shape), digest) for name, dtype, shape, digest in report["stream"]}


def _stream_differences(first: str, sent: Mapping[str, tuple], who: str, got: Mapping[str, tuple]) -> Iterator[str]:
    if missing := [name for name in sent if name not in got]:
        yield f"{who} did not get {listed(missing)}, which {first} sent"
    if surplus := [name for name in got if name not in sent]:
        yield f"{who} got {listed(surplus)}, which {first} did not send"
    both = [name for name in sent if name in got]
    if other := [name for name in both if sent[name][:2] != got[name][:2]]:
        name = other[0]
        there, here = (f"{dtype}{list(shape)}" for dtype, shape, _ in (sent[name], got[name]))
        yield f"{who} has {listed(other)} in another dtype or shape than {first} sent: {here} instead of {there}"
    changed = [name for name in both if sent[name][:2] == got[name][:2] and sent[name][2] != got[name][2]]
    if changed:
        yield f"{who} has other values than {first} sent: {listed(changed)}"


def holding_faults(receivers: Named) -> Iterator[str]:
    """Workers that do not hold what was copied into them."""
    for who, report in receivers:
        if report["mismatches"]:
            yield f"{who} does not hold what it got: {listed(report['mismatches'])}"


def unchecked(receivers: Named) -> Iterator[str]:
    """What the audit could not look at: parameters that the sync did not write, and what is gone since."""
    for who, report in receivers:
        if report["not_loaded"]:
            yield f"{who} has parameters that the sync did not write: {listed(report['not_loaded'])}"
        if report["partly_loaded"]:
            parts = [f"{name} ({count:,} elements)" for name, count in report["partly_loaded"].items()]
            yield f"{who} holds in part what the sync did not write: {listed(parts)}"
        if report["idle"]:
            yield f"{who} did nothing with {listed(report['idle'])} (with a tied head, that is as it should be)"
        if report["gone"]:
            yield f"{who} has no more of what was loaded into {listed(report['gone'])}: unchecked"


def probe_fault(trained: Sequence[float], rolled_out: Mapping[str, Sequence[float]], limit: float) -> Iterator[str]:
    """Rollouts whose log-probabilities of the probe's tokens are too far from the actor's on average, in nats."""
    if not all(map(math.isfinite, trained)):
        yield (
            "the actor's own log-probabilities of the probe's tokens are not finite: its forward pass overflows. "
            "`verl-fp16 preflight MODEL` tells whether weights are beyond float16's range; if so, cut them in the "
            "checkpoint, or train in bfloat16"
        )
        return
    for who, log_probs in rolled_out.items():
        if not all(map(math.isfinite, log_probs)):
            yield f"{who} holds the weights, and its log-probabilities of the probe's tokens are not finite"
            continue
        mean = probe_distance(trained, log_probs)
        if mean > limit:
            yield (
                f"{who} holds the weights and computes with others: over {len(log_probs)} tokens its log-probabilities "
                f"are {mean:.3g} nats from the actor's on average, and verl_fp16.sync.probe_tolerance allows {limit:g} "
                "here (a kernel that reads a packed copy of an older weight does so, or two models that differ)"
            )


def probe_distance(trained: Sequence[float], rolled_out: Sequence[float]) -> float:
    """Mean |difference| of log-probabilities in nats, over the tokens that both have."""
    return statistics.fmean(abs(a - b) for a, b in zip(trained, rolled_out, strict=False))


def learned(receivers: Named) -> dict[str, list[str]]:
    """``narrow``: names in the stream that every worker can take in the rollout's dtype; ``exempt``: those that no
    worker holds in it."""
    wide = {name for _, report in receivers for name in report["wide"]}
    seen = [name for _, report in receivers[:1] for name, *_ in report["stream"]]
    exempt = set.intersection(*(set(report["exempt"]) for _, report in receivers)) if receivers else set()
    return {"narrow": [name for name in seen if name not in wide], "exempt": [name for name in seen if name in exempt]}


def cast_faults(senders: Named, exempt: Collection[str] = ()) -> dict[str, dict[str, float]]:
    """Name -> counts, summed over ranks, of tensors with values that overflowed or were not finite.

    Args:
        exempt: names in the stream that are held in other dtypes only.
    """
    found: dict[str, dict[str, float]] = {}
    for _, report in senders:
        for name, counts in report["faults"].items():
            if set(report["streamed_as"][name] or [name]) <= set(exempt):
                continue
            merged = found.setdefault(name, dict.fromkeys(counts, 0))
            for key, number in counts.items():
                merged[key] = max(merged[key], number) if key == "max_abs" else merged[key] + number
    return found


def metrics(senders: Named, seconds: float) -> dict[str, float]:
    """What one sync adds to the training step's metrics, under ``sync/``."""
    values = [report["values"] for _, report in senders if report["values"]]
    found = {"sync/bytes": float(max(report["bytes"] for _, report in senders)), "sync/seconds": seconds}
    for metric, field in (("overflow", "overflow"), ("flushed", "flushed"), ("subnormal", "subnormal")):
        found[f"sync/{metric}_values"] = float(sum(counts[field] for counts in values))
    found["sync/max_abs_weight"] = max((counts["max_abs"] for counts in values), default=0.0)
    samples = [report["sample"] for _, report in senders]
    changed = sum(sample["changed"] for sample in samples)
    if changed:
        found["sync/unchanged_fraction"] = sum(sample["hidden"] for sample in samples) / changed
        found["sync/unchanged_fraction_bf16"] = sum(sample["hidden_bf16"] for sample in samples) / changed
    return found


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
