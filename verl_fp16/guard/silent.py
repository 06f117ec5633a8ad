"""What verl takes without a word and does otherwise than one would read it: answers cut, groups of one, no prompts."""

from __future__ import annotations

from collections.abc import Iterator

from verl_fp16.findings import Finding
from verl_fp16.guard.case import GENERATION, MODELS, Case

ROOM = f"{GENERATION}.max_model_len"
ESTIMATOR = "algorithm.adv_estimator"
OVERLONG = "reward.reward_kwargs.overlong_buffer_cfg"
TEMPLATE = f"{MODELS[0]}.custom_chat_template"
# Those that take 0 for the mean of a group of one, read in verl's core_algos.
GROUPED = ("grpo", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline")


def answer_room(case: Case) -> Iterator[Finding]:
    """An answer gets what its prompt leaves of ``max_model_len``, also where that is less than ``response_length``."""
    room, prompt, answer = (case.get(f"{GENERATION}.{name}", None) for name in _LENGTHS)
    if not all(isinstance(value, int) for value in (room, prompt, answer)) or room >= prompt + answer:
        return
    why = f"prompts of {prompt} tokens and answers of {answer} do not fit: answers are cut where it ends, unannounced"
    yield Finding("warning", ROOM, room, why, (f"{ROOM}={prompt + answer}",))


_LENGTHS = ("max_model_len", "prompt_length", "response_length")


def group_of_one(case: Case) -> Iterator[Finding]:
    """With a single answer to a question there is no mean to compare it with."""
    estimator, answers = case.get(ESTIMATOR, None), case.get(f"{GENERATION}.n", None)
    if estimator in GROUPED and answers == 1 and case.get("trainer.val_only", False) is not True:
        why = f"{estimator} compares the answers to a question, and of one alone it takes the bare reward"
        yield Finding("warning", f"{GENERATION}.n", answers, why, (f"{GENERATION}.n=8",), f"or {ESTIMATOR}=gae")


def overlong_buffer(case: Case) -> Iterator[Finding]:
    """DAPO's reward manager asserts it in its workers, when Ray and vLLM have been started."""
    if case.get("reward.reward_manager.name", None) != "dapo" or case.get(f"{OVERLONG}.enable", False) is not True:
        return
    buffer, limit = case.get(f"{OVERLONG}.len", None), case.get("reward.reward_kwargs.max_resp_len", None)
    if isinstance(buffer, int) and isinstance(limit, int) and buffer > limit:
        why = f"it is the end of an answer in which reward is taken off, and answers have {limit} tokens at most"
        fix = (f"{OVERLONG}.len={max(1, limit // 5)}",)
        yield Finding("error", f"{OVERLONG}.len", buffer, why, fix, f"or {OVERLONG}.enable=false")


def unseen_chat_template(case: Case) -> Iterator[Finding]:
    """0.8's trainers build the data's tokenizer without it (``main_ppo``, ``main_ppo_sync``).

    ``RLHFDataset`` takes a prompt that it cannot render for one that is too long.
    """
    template = case.get(TEMPLATE, None)
    if template is None or not case.verl.startswith("0.8.") or case.get("data.filter_overlong_prompts", True) is False:
        return
    why = (
        "verl 0.8 measures prompts without it: of a model that has no template of its own none is left, of another "
        "those that its own template makes too long: take verl 0.9 or later, or do not measure"
    )
    yield Finding("error", TEMPLATE, template, why, ("data.filter_overlong_prompts=false",))


RULES = (answer_room, group_of_one, overlong_buffer, unseen_chat_template)
