"""The judgement of what a model did in FP16 on some prompts: the reasons beside those of its weights. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from verl_fp16.loss_scale_settings import LossScaleSettings
from verl_fp16.preflight.activations import LARGEST, Tally
from verl_fp16.preflight.passes import Measured
from verl_fp16.preflight.verdict import AT_RISK, FIT, UNFIT, Reason, Verdict

HEADROOM = 4.0
"""How many times its largest activation the range of float16 should hold. The largest hidden state published for
Qwen2.5-7B, 12,712, leaves a headroom of 5.2, and models of that kind are trained in FP16; training and other prompts
than these may double an activation, and what is computed of it inside of a module, once more."""

SMALLEST_SCALE = 16.0
"""The loss scale that should be usable. The scaler halves the scale down to ``verl_fp16.loss_scale.min``, 1: from 16
on it can answer gradients sixteen times as large as these, and below, it soon can lower the scale no further."""

_NAMED = 5


def default_exponent() -> int:
    """Of the first loss scale of a run that sets none."""
    return int(LossScaleSettings().init).bit_length() - 1


def judge_run(weights: Verdict, measured: Measured) -> Verdict:
    """The verdict of both halves; the reasons of the worst kind come first."""
    reasons = [*weights.reasons, *_reasons(measured)]
    reasons.sort(key=lambda reason: (UNFIT, AT_RISK).index(reason.verdict))
    return Verdict(reasons[0].verdict if reasons else FIT, tuple(reasons))


def _reasons(measured: Measured) -> Iterator[Reason]:
    if bad := [name for name, tally in measured.outputs.items() if tally.non_finite]:
        arises = measured.culprits or bad[:1]
        yield Reason(
            UNFIT,
            f"the forward pass is not finite in float16: it arises in {_some([_told(measured, n) for n in arises])}, "
            f"and {len(bad)} of {len(measured.outputs)} modules give inf or nan. Fix: use +precision=bf16",
        )
    tight = [
        (name, tally)
        for name, tally in measured.outputs.items()
        if not tally.non_finite and tally.headroom is not None and tally.headroom < HEADROOM
    ]
    if tight:
        tight.sort(key=lambda found: -found[1].largest)
        named = _some(
            [f"{name} (largest {tally.largest:,.5g}, headroom {tally.headroom:.1f})" for name, tally in tight]
        )
        modules = "1 module has" if len(tight) == 1 else f"{len(tight)} modules have"
        yield Reason(
            AT_RISK,
            f"{modules} a headroom below {HEADROOM:g}, activations above {LARGEST / HEADROOM:,.0f}: {named}. "
            "Fix: try prompts of your own (--prompts), or use +precision=bf16",
        )
    yield from _of_the_loss_scale(measured)


def _of_the_loss_scale(measured: Measured) -> Iterator[Reason]:
    found = measured.loss_scale
    if found is None:
        return
    if found.exponent is None and found.largest_at_one is None:
        first = next((g.first_non_finite for g in reversed(measured.gradients.values()) if g.first_non_finite), "?")
        yield Reason(
            UNFIT,
            f"the backward pass is not finite at any loss scale, down to 2^{found.tried[-1]}: in its order first at "
            f"{first}. Fix: use +precision=bf16",
        )
    elif found.scale is not None and found.scale < SMALLEST_SCALE:
        yield Reason(
            AT_RISK,
            f"gradients overflow from a loss scale of {2 * found.scale:g} on: the largest without a scale is "
            f"{found.largest_at_one:.4g}, of {largest_gradient(measured)}. Fix: start from "
            f"verl_fp16.loss_scale.init={found.scale:g}{_floor(found.scale)}, or use +precision=bf16",
        )


def _floor(scale: float) -> str:
    least = LossScaleSettings().min
    return f" with verl_fp16.loss_scale.min={scale / 16:g}" if scale < 16 * least else ""


def largest_gradient(measured: Measured) -> str:
    """The module or the parameter whose gradient is the largest of all."""
    outputs, weights = measured.largest_outputs, measured.largest_weights
    if not outputs and not weights:
        return "none"
    output, weight = (max(found, key=found.get) if found else "" for found in (outputs, weights))
    if outputs.get(output, 0.0) >= weights.get(weight, 0.0):
        return f"the output of {output}"
    return weight


def _told(measured: Measured, name: str) -> str:
    tally: Tally = measured.outputs[name]
    return f"{name} ({measured.kinds[name]}, {tally.non_finite:,} of {tally.values:,} values)"


def _some(names: list[str]) -> str:
    more = f"; and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return "; ".join(names[:_NAMED]) + more
