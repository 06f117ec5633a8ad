"""The loss uses the rollout's log-probs as it says, and the measured gap is one of precision."""

from __future__ import annotations

from collections.abc import Iterator

from verl_fp16.findings import Finding
from verl_fp16.guard.case import GENERATION, Case

BYPASS = "algorithm.rollout_correction.bypass_mode"
LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"
FILTER = "algorithm.filter_groups"
SAMPLER = "trainer.v1.sampler.custom_sampler"
CORRECTION = "actor_rollout_ref.actor.policy_loss.rollout_correction"


def bypass_mode(case: Case) -> Iterator[Finding]:
    """Bypass mode: old log-probs are the rollout's.

    ``algorithm.rollout_correction.bypass_mode`` only copies them; the loss is chosen by ``policy_loss.loss_mode`` and
    takes its settings from ``policy_loss.rollout_correction``. The legacy trainer does set both
    (``rollout_corr_helper.apply_bypass_mode``), but in the first step and in its own process, when the workers have
    had their configuration since ``init_workers``.
    """
    bypass, loss = case.get(BYPASS, False), case.get(LOSS, "vanilla") == "bypass_mode"
    if bypass is True and not loss:
        why = (
            "the trainer only copies the rollout's log-probs into the old ones and its workers train plain PPO: "
            f"loss_type, rollout_is and rollout_rs do nothing unless the loss is {LOSS}=bypass_mode too"
        )
        fix = (f"{LOSS}=bypass_mode", f"+{CORRECTION}=${{algorithm.rollout_correction}}")
        yield Finding("error", BYPASS, bypass, why, fix, f"or {BYPASS}=false")
    elif loss and bypass is not True:
        why = f"this loss takes the old log-probs for the rollout's, which they are only with {BYPASS}=true"
        yield Finding("error", LOSS, "bypass_mode", why, (f"{LOSS}=vanilla",), f"or {BYPASS}=true")
    elif bypass is True:
        yield from _different_corrections(case)
    elif bypass is not False:
        yield Finding("error", BYPASS, bypass, "must be true or false", (f"{BYPASS}=false",))


def _different_corrections(case: Case) -> Iterator[Finding]:
    wanted, used = case.children("algorithm.rollout_correction"), case.children(CORRECTION)
    for name, value in wanted.items():
        if name != "bypass_mode" and used.get(name) != value:
            why = f"the loss reads {CORRECTION}.{name}, which is {used.get(name, 'not set')}"
            fix = (case.set_to(CORRECTION, "${algorithm.rollout_correction}"),)
            yield Finding("error", f"algorithm.rollout_correction.{name}", value, why, fix)


def unequal_batches(case: Case) -> Iterator[Finding]:
    """Other micro-batches mean other kernels, and so other log-probs of the same tokens (verl issue 6280)."""
    actor = "actor_rollout_ref.actor"
    if case.get(f"{actor}.use_dynamic_bsz", False):
        pair = f"{GENERATION}.log_prob_max_token_len_per_gpu", f"{actor}.ppo_max_token_len_per_gpu"
    else:
        pair = f"{GENERATION}.log_prob_micro_batch_size_per_gpu", f"{actor}.ppo_micro_batch_size_per_gpu"
    log_prob, update = (case.get(key, None) for key in pair)
    if log_prob != update:
        why = f"{pair[1]} is {update}: batches of other shapes run other kernels, which looks like a gap of precision"
        yield Finding("warning", pair[0], log_prob, why, (f"{pair[0]}={'null' if update is None else update}",))
    key = f"{GENERATION}.log_prob_use_dynamic_bsz"
    ours, theirs = case.get(key, False), case.get(f"{actor}.use_dynamic_bsz", False)
    if ours != theirs:
        why = f"{actor}.use_dynamic_bsz is {str(theirs).lower()}: verl's workers stop unless the two are equal"
        yield Finding("error", key, ours, why, (f"{key}={str(theirs).lower()}",))


def group_filtering(case: Case) -> Iterator[Finding]:
    """DAPO's filter of groups: done by the v1 trainer's own replay buffer (``trainer_base._build_replay_buffer``).

    The trainers of 0.8.0 and the legacy trainer hold the setting and never read it.
    """
    if case.get(f"{FILTER}.enable", False) is not True:
        return
    off = (case.set_to(f"{FILTER}.enable", "false"),)
    if case.verl.startswith("0.8."):
        why = "neither trainer of verl 0.8 filters groups: take verl 0.9 or later, or do without"
        yield Finding("error", f"{FILTER}.enable", True, why, off)
    elif case.get("trainer.use_v1", False) is not True:
        why = "the legacy trainer does not filter groups, only the v1 trainer does"
        yield Finding("error", f"{FILTER}.enable", True, why, ("trainer.use_v1=true",), f"or {FILTER}.enable=false")
    elif all(case.get(f"{SAMPLER}.{part}", None) for part in ("path", "name")):  # verl takes its own if one is missing
        why = "a custom sampler takes the place of the replay buffer that filters groups"
        fix = (f"{SAMPLER}.path=null", f"{SAMPLER}.name=null")
        yield Finding("error", f"{FILTER}.enable", True, why, fix, f"or {FILTER}.enable=false")
    most = case.get(f"{FILTER}.max_num_gen_batches", 0)
    if isinstance(most, int) and most > 0:
        why = "no trainer reads it: max_inflight_gen_batches bounds what is generated at a time"
        yield Finding("warning", f"{FILTER}.max_num_gen_batches", most, why, (f"{FILTER}.max_num_gen_batches=0",))


RULES = (bypass_mode, unequal_batches, group_filtering)
