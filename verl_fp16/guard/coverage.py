"""Entry points and places that the flag does not reach, or of which nothing is read back."""

from __future__ import annotations

from collections.abc import Iterator

from verl_fp16.findings import Finding
from verl_fp16.guard.case import NODE, Case

# Trainers whose fit is not the one of verl.trainer.ppo.
UNCOVERED = {
    "fully_async_policy": "the fully asynchronous trainer",
    "main_ppo_sync": "the trainer of main_ppo_sync",
}


def entry_point(case: Case) -> Iterator[Finding]:
    """Only the PPO entry points have the roles that the flag configures."""
    if "_target_" not in case.children("actor_rollout_ref.actor"):
        why = "the groups precision=... are for verl's PPO entry points (main_ppo and others): nothing reads them here"
        yield Finding("error", NODE, "...", why, advice="drop the group here")


def trainers(case: Case) -> Iterator[Finding]:
    """Trainers of their own ``fit``, in which the dtypes in force are not read back."""
    for part, name in UNCOVERED.items():
        if part in case.entry.split("."):
            why = f"{name} has its own loop, where the dtypes in force are not read back and a difference stops nothing"
            yield Finding(
                "warning", "entry point", case.entry, why, advice="check actor/loss_scale and mismatch/* in the log"
            )


RULES = (entry_point, trainers)
