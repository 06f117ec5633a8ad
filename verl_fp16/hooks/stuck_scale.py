"""Ends a run whose loss scaler skips every update and cannot go lower: an observer of the training step."""

from __future__ import annotations

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
    reports, failures = _reports(step.trainer, settings.read_back_timeout_s)
    for role, fields in reports:
        if role in suspects and fields["stuck"]:
            step.save_checkpoint()
            step.stop(_reason(role, fields, limits[role]))
            return
    for role in suspects:
        if role not in dict(reports):
            # Nobody can say why. That it goes on like this is no reason to.
            step.save_checkpoint()
            skips = f"{step.metrics[f'{role}/consecutive_skips']:.0f} updates of the {role} in a row were skipped"
            step.stop(f"{skips}, and its workers do not say why: {'; '.join(failures)}")
            return


def _reports(trainer: Any, timeout_s: float) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """(role, what its engine says of itself) of every rank that answers, and why the others did not."""
    from verl_fp16.readback.gather import ask, training_questions

    answers = ask(training_questions(trainer), timeout_s)
    reports = [item for answer in answers if answer.report for item in answer.report["roles"].items()]
    return reports, [f"{answer.name()}: {answer.failure}" for answer in answers if not answer.report]


def _reason(role: str, fields: dict[str, Any], settings: LossScaleSettings) -> str:
    skip = fields["last_skip"]
    where = "verl_fp16.loss_scale" if role == "actor" else "verl_fp16.critic_loss_scale"
    model = "actor_rollout_ref" if role == "actor" else "critic"
    scale = f"the loss scale {fields['scale']:g}"
    if skip["kind"] == FORWARD:
        state = f"lowering {scale} is no cure"
        tries = f"the model does not fit float16 here: +precision=bf16, or another checkpoint in {model}.model.path"
    elif skip["kind"] == GRADIENT and settings.mode == "static":
        state = f"{scale} is static"
        tries = f"{where}.mode=dynamic, or a lower {where}.init than {settings.init:g}"
    elif skip["kind"] == GRADIENT:
        state = f"{scale} goes no lower"
        tries = f"a lower {where}.min than {settings.min:g}, a lower learning rate, or +precision=bf16"
    else:
        state = f"lowering {scale} is no cure"
        tries = "a lower learning rate, or the data of this step"
    return (
        f"{skip['consecutive']} updates of the {role} in a row were skipped (verl_fp16 stops at "
        f"{where}.max_consecutive_skips={settings.max_consecutive_skips}), and {state}. The newest: "
        f"{fields['last_skip_line']}. The checkpoint of this step has the last good weights. Try: {tries}"
    )
