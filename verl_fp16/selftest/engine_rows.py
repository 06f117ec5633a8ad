"""What the facts of verl's FSDP engine come to. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from verl_fp16.selftest.engine_plan import FAULTY, LOSS_SCALE
from verl_fp16.selftest.rows import FAIL, Facts, Row, verdict

_WANTED = {"autocast": "float16", "fsdp_param": ["float16"], "master": ["float32"], "scaler": "LossScaler"}
_WORDS = {
    "autocast": "autocast",
    "fsdp_param": "FSDP's parameters",
    "master": "master weights",
    "scaler": "loss scaler",
}
# On a GPU sums may come out in another order in another process.
_GPU_TOLERANCE = 1e-3


def engine_rows(facts: Facts) -> list[Row]:
    """The rows of every strategy in ``facts``, see :mod:`verl_fp16.selftest.engine_stage`."""
    return [row for strategy, found in facts.items() for row in _rows(f"engine {strategy}", found)]


def _rows(name: str, facts: Facts) -> Iterator[Row]:
    seconds, log = facts.get("seconds"), f"{name.replace(' ', '-')}-first-0.log"
    if "first" not in facts:
        yield Row(name, FAIL, facts["failed"], seconds, log)
        return
    ranks = facts["first"]
    rows = [_dtypes(ranks), _learns(ranks), _skip(ranks), _scale(ranks)]
    if "resumed" in facts:
        rows.append(_resume(ranks, facts["resumed"], facts["device"] == "gpu"))
    else:
        rows.append(Row("resume", FAIL, facts["failed"]))
    for row in rows:
        yield Row(f"{name}: {row.name}", row.status, row.reason, seconds, log)


def _dtypes(ranks: Sequence[Facts]) -> Row:
    wrong = [
        f"rank {number}: {_WORDS[field]} {_text(rank['read_back'][field])}, wanted {_text(wanted)}"
        for number, rank in enumerate(ranks)
        for field, wanted in _WANTED.items()
        if rank["read_back"][field] != wanted
    ]
    good = f"autocast and FSDP's parameters float16, master weights float32, on {_count(ranks)}"
    return verdict("dtypes", not wrong, good, "; ".join(wrong))


def _text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _count(ranks: Sequence[Facts]) -> str:
    return "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"


def _learns(ranks: Sequence[Facts]) -> Row:
    losses = [_mean(rank["updates"][at]["loss"] for rank in ranks) for at in range(len(ranks[0]["updates"]))]
    losses.append(_mean(rank["next"]["loss"] for rank in ranks))
    text = f"from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} updates"
    good = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    return verdict("loss", good, text, f"it did not go down: {text}")


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _skip(ranks: Sequence[Facts]) -> Row:
    """Skipped on all ranks, nothing touched, and the updates around it applied."""
    wrong = []
    for number, rank in enumerate(ranks):
        before, faulty, after = rank["updates"][FAULTY - 2 : FAULTY + 1]
        if faulty["skipped"] is not True:
            wrong.append(f"rank {number} did not skip update {FAULTY}, in which a gradient overflowed")
        if faulty["digest"] != before["digest"]:
            wrong.append(f"rank {number}: weights or optimizer state changed in the skipped update")
        if after["digest"] == faulty["digest"]:
            wrong.append(f"rank {number}: the update after it changed nothing")
    where = "is skipped" if len(ranks) == 1 else f"on one rank is skipped on all {len(ranks)}"
    good = f"an overflow {where}; weights and optimizer state are as before to the bit"
    return verdict("skipped update", not wrong, good, "; ".join(wrong))


def _scale(ranks: Sequence[Facts]) -> Row:
    found = {(rank["updates"][FAULTY - 2]["scale"], rank["updates"][FAULTY - 1]["scale"]) for rank in ranks}
    text = ", ".join(f"{_number(before)} to {_number(after)}" for before, after in sorted(found, key=str))
    good = found == {(LOSS_SCALE, LOSS_SCALE / 2)}
    return verdict("loss scale", good, f"halved, {text}", f"not halved on every rank by the overflow: {text}")


def _number(value: float | None) -> str:
    return "no scale" if value is None else f"{value:g}"


def _resume(ranks: Sequence[Facts], resumed: Sequence[Facts], gpu: bool) -> Row:
    wrong, exact = [], True
    for number, (rank, again) in enumerate(zip(ranks, resumed, strict=True)):
        saved, loaded = rank["saved"], again["loaded"]
        if loaded["scale"] != saved["scale"]:
            told = f"{_number(saved['scale'])} was saved, {_number(loaded['scale'])} came back"
            wrong.append(f"rank {number}: another loss scale: {told}")
        elif saved["scaler"] is None or loaded["scaler"] != saved["scaler"]:
            wrong.append(f"rank {number}: other counters of the loss scaler: {_differing(saved, loaded)}")
        if loaded["digest"] != saved["digest"]:
            wrong.append(f"rank {number}: other weights or optimizer state")
        same, alike = _compared(rank["next"], again["next"])
        exact = exact and same
        if not (same or (gpu and alike)):
            wrong.append(f"rank {number}: another next update: {_update(rank['next'])}, then {_update(again['next'])}")
    how = (
        "the next update to the bit" if exact else f"the next update but for the order of sums (to {_GPU_TOLERANCE:g})"
    )
    return verdict("resume", not wrong, f"in a fresh process: loss scale, counters, weights, {how}", "; ".join(wrong))


def _differing(saved: Facts, loaded: Facts) -> str:
    was, now = saved["scaler"] or {}, loaded["scaler"] or {}
    told = [f"{key} {was.get(key)} and {now.get(key)}" for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
    return ", ".join(told) or "there are none"


def _compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether two updates are the same to the bit, and whether they are but for the order of their sums."""
    same = all(a[name] == b[name] for name in ("digest", "loss", "grad_norm", "scale"))
    numbers = [(a[name], b[name]) for name in ("loss", "grad_norm")]
    alike = all(x is not None and y is not None and math.isclose(x, y, rel_tol=_GPU_TOLERANCE) for x, y in numbers)
    return same, alike and a["scale"] == b["scale"]


def _update(update: Mapping[str, Any]) -> str:
    norm = update["grad_norm"]
    return f"loss {update['loss']:.6f}, gradient norm {'none' if norm is None else format(norm, '.6f')}"
