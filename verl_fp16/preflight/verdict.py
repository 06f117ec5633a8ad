"""The judgement: whether a model's weights can be trained and rolled out in FP16. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from verl_fp16.preflight.weights import TensorReport
from verl_fp16.weight_cast import non_finite_message, overflow_message

FIT, AT_RISK, UNFIT = "FIT", "AT RISK", "UNFIT"
EXIT_CODES = {FIT: 0, AT_RISK: 1, UNFIT: 2}

LARGEST = 65504.0
ROOM = 16
"""How many times its largest weight the range of float16 should hold: of a weight closer to the end of the range, the
product with an ordinary activation is beyond it, and an update may bring the weight there."""

FLUSHED_SHARE = 0.01
"""The share of a tensor's weights that may become zero. Of normally distributed weights that many do at a standard
deviation of 2.4e-6, where FP16's rounding error is four times BF16's."""

BF16_ROUNDING = 1.66e-3
"""BF16's relative rounding error on normally distributed weights. FP16's may come up to it also where BF16 happens to
hold a tensor exactly, as one that is stored in it: the tensor's next update would be rounded by so much."""

_NAMED = 5


@dataclass(frozen=True)
class Reason:
    """Why a verdict is not FIT, in a sentence that names the tensors and ends with what to do."""

    verdict: str
    why: str


@dataclass(frozen=True)
class Verdict:
    """FIT, AT RISK or UNFIT; the reasons of the worst kind come first."""

    verdict: str
    reasons: tuple[Reason, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]


def judge(reports: Sequence[TensorReport], model_type: str | None, refused_types: Iterable[str]) -> Verdict:
    """Judge a model.

    Args:
        reports: of all weights.
        model_type: the architecture, None if it is unknown.
        refused_types: architectures that vLLM refuses in float16.
    """
    counts = {report.name: report.counts for report in reports}
    unfit = [overflow_message(counts, torch.float16), non_finite_message(counts)]
    if model_type in set(refused_types):
        unfit.append(
            f"the architecture {model_type} is one that vLLM refuses in float16, since its activations overflow: the "
            "rollout would not start. Fix: use +precision=bf16"
        )
    risks = [_large(reports), _flushed(reports), _worse_than_bf16(reports)]
    reasons = [Reason(UNFIT, why) for why in unfit if why] + [Reason(AT_RISK, why) for why in risks if why]
    return Verdict(reasons[0].verdict if reasons else FIT, tuple(reasons))


def by_severity(reports: Iterable[TensorReport]) -> list[TensorReport]:
    """The worst first: those with faults, then the ones closest to a limit, or furthest beyond it."""
    return sorted(reports, key=lambda r: (r.counts.non_finite + r.counts.overflow, closeness(r)), reverse=True)


def closeness(report: TensorReport) -> float:
    """How close a tensor is to what makes it a risk: from 1 on, it is one."""
    return max(
        report.counts.max_abs * ROOM / LARGEST,
        flushed_share(report) / FLUSHED_SHARE,
        report.fp16_error / max(report.bf16_error, BF16_ROUNDING),
    )


def flushed_share(report: TensorReport) -> float:
    """The share of all values that become zero."""
    return report.counts.flushed / report.counts.values if report.counts.values else 0.0


def _large(reports: Sequence[TensorReport]) -> str:
    return _risk(
        [r for r in reports if LARGEST / ROOM < r.counts.max_abs and not r.counts.overflow],
        key=lambda r: r.counts.max_abs,
        told=lambda r: f"largest magnitude {r.counts.max_abs:.6g}",
        fault=f"has weights above {LARGEST / ROOM:,.0f}, a {ROOM}th of float16's range",
        way_out="see that activations stay finite in float16 before training, or use +precision=bf16",
    )


def _flushed(reports: Sequence[TensorReport]) -> str:
    return _risk(
        [r for r in reports if flushed_share(r) > FLUSHED_SHARE],
        key=flushed_share,
        told=lambda r: f"{r.counts.flushed:,} of {r.counts.values:,}, {flushed_share(r):.1%}",
        fault=f"loses more than {FLUSHED_SHARE:.0%} of its weights to zero",
        way_out="scale the tensor up where the model allows it, or use +precision=bf16",
    )


def _worse_than_bf16(reports: Sequence[TensorReport]) -> str:
    return _risk(
        [r for r in reports if r.fp16_error > max(r.bf16_error, BF16_ROUNDING)],
        key=lambda r: r.fp16_error,
        told=lambda r: f"{r.fp16_error:.1e}, BF16 {max(r.bf16_error, BF16_ROUNDING):.1e}",
        fault="is rounded worse by FP16 than by BF16, its weights being subnormal in float16",
        way_out="+precision=bf16 keeps more of it",
    )


def _risk(
    found: list[TensorReport],
    key: Callable[[TensorReport], float],
    told: Callable[[TensorReport], str],
    fault: str,
    way_out: str,
) -> str:
    if not found:
        return ""
    worst = sorted(found, key=key, reverse=True)
    named = "; ".join(f"{report.name} ({told(report)})" for report in worst[:_NAMED])
    more = f"; and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
    tensors = "1 tensor" if len(worst) == 1 else f"each of {len(worst)} tensors"
    return f"{tensors} {fault}: {named}{more}. Fix: {way_out}"
