"""Ends a run whose loss scaler skips every update and cannot go lower: an observer of the training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verl_fp16.hooks.driver import read_settings
from verl_fp16.loss_scale_settings import FORWARD, GRADIENT, LossScaleSettings
from verl_fp16.training_step import StepRecord


def stop_when_stuck(step: StepRecord) -> None:
    """Save a checkpoint of the last good weights, which skipped updates have left as they were, and stop."""
    settings = read_settings(step.trainer.config)
    limits = {"actor": settings.loss_scale, "critic": settings.critic_loss_scale}
    suspects = [
        role
        for role, limit in limits.items()
        if step.metrics.get(f"{role}/consecutive_skips", 0) >= limit.max_consecutive_skips
    ]
    if not suspects:
        return
    for role, fields in _reports(step.trainer, settings.read_back_timeout_s):
        if role in suspects and fields["stuck"]:
            step.save_checkpoint()
            step.stop(_reason(role, fields, limits[role]))
            return


def _reports(trainer: Any, timeout_s: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """(role, what its engine says of itself), of every rank that answers."""
    from verl_fp16.readback.gather import ask, training_questions

    for answer in ask(training_questions(trainer), timeout_s):
        yield from (answer.report or {}).get("roles", {}).items()


def _reason(role: str, fields: dict[str, Any], settings: LossScaleSettings) -> str:
    skip = fields["last_skip"]
    where = "verl_fp16.loss_scale" if role == "actor" else "verl_fp16.critic_loss_scale"
    model = "actor_rollout_ref" if role == "actor" else "critic"
    if skip["kind"] == FORWARD:
        tries = (
            f"the model does not fit float16 here: +precision=bf16, or another checkpoint of it in {model}.model.path"
        )
    elif skip["kind"] == GRADIENT and settings.mode == "static":
        tries = f"{where}.mode=dynamic, or a lower {where}.init than {settings.init:g}"
    elif skip["kind"] == GRADIENT:
        tries = f"a lower {where}.min than {settings.min:g}, a lower learning rate, or +precision=bf16"
    else:
        tries = "a lower learning rate, or the data of this step"
    return (
        f"{skip['consecutive']} updates of the {role} in a row were skipped (verl_fp16 stops at "
        f"{where}.max_consecutive_skips={settings.max_consecutive_skips}), and the loss scale {fields['scale']:g} goes "
        f"no lower. The newest: {fields['last_skip_line']}. The checkpoint of this step has the last good weights. "
        f"Try: {tries}"
    )
