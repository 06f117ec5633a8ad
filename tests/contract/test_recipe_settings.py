"""The recipes' numbers: the paper's settings, the optimizer that verl builds of them, DAPO's parts beside its loss."""

from __future__ import annotations

import types
from typing import Any
from unittest import mock

import pytest
import torch
from omegaconf import OmegaConf
from recipe_runs import composed, overridden, step_with
from recipe_workers import one_process_on_cpu

from verl_fp16 import plugin
from verl_fp16.quickstart.task import DATA_SOURCE

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


@pytest.fixture(scope="module", autouse=True)
def verl_with_plugin():
    import verl  # noqa: F401

    plugin.require_active(verify=True)
    with one_process_on_cpu():
        yield


# --- the paper's numbers ---------------------------------------------------------------------------------------------

# Questions of a step and of an update, answers of each, tokens of a prompt and of an answer.
SIZES = {
    **{f"sanity_{algorithm}": (64, 16, 8, 1024, 8192) for algorithm in (
        "grpo", "grpo_token_tis", "grpo_seq_mis", "gspo", "pg_seq_is", "pg_seq_tis", "pg_seq_mis", "pg_token_is"
    )},
    "precision_ablation": (64, 16, 8, 1024, 8192),
    "two_nodes": (64, 16, 8, 1024, 8192),
    "moe_grpo_seq_mis": (512, 32, 16, 2048, 20480),
    "moe_grpo_token_tis": (512, 32, 16, 2048, 20480),
    "moe_pg_seq_tis": (512, 32, 16, 2048, 20480),
    "dapo_14b": (512, 32, 16, 2048, 20480),
    "lora_grpo_token_tis": (64, 16, 8, 1024, 3000),
    "octothinker_grpo": (128, 16, 8, 1024, 3000),
}  # fmt: skip
# Those that are not the paper's usual: learning rate, betas, eps, weight decay, steps of warm-up.
OPTIMIZERS = {
    "lora_grpo_token_tis": (4e-5, (0.9, 0.95), 1e-15, 0.0, 0),
    "dapo_14b": (1e-6, (0.9, 0.999), 1e-8, 0.1, 10),
}
PAPERS = (1e-6, (0.9, 0.95), 1e-15, 0.0, 0)


@pytest.mark.parametrize("name", SIZES)
def test_the_paper_s_numbers(name):
    config = composed(name)

    def value(key: str) -> Any:
        return OmegaConf.select(config, key, throw_on_missing=True)

    sizes = ("data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size", f"{ROLLOUT}.n")
    lengths = ("data.max_prompt_length", "data.max_response_length")
    assert tuple(value(key) for key in (*sizes, *lengths)) == SIZES[name]
    assert (value(f"{ROLLOUT}.temperature"), value(f"{ROLLOUT}.top_p"), value(f"{ROLLOUT}.top_k")) == (1, 1, -1)
    validation = [value(f"{ROLLOUT}.val_kwargs.{key}") for key in ("do_sample", "temperature", "top_p")]
    assert validation == [True, 0.6, 0.95]
    assert value(f"{ACTOR}.use_kl_loss") is value("algorithm.use_kl_in_reward") is False
    assert value(f"{ACTOR}.entropy_coeff") == 0
    assert value(f"{ACTOR}.ppo_epochs") == 1
    assert value(f"{ROLLOUT}.max_model_len") >= sum(SIZES[name][3:])
    if name.startswith(("moe", "dapo")):
        assert value(f"{ACTOR}.ppo_max_token_len_per_gpu") == 22528


def test_what_single_recipes_say():
    for name, settings in {
        "sanity_grpo": {f"{ROLLOUT}.val_kwargs.n": 32, "trainer.n_gpus_per_node": 8, "trainer.nnodes": 1},
        "lora_grpo_token_tis": {"actor_rollout_ref.model.lora_rank": 32, "actor_rollout_ref.model.lora_alpha": 64},
        "dapo_14b": {"algorithm.filter_groups.max_inflight_gen_batches": 3, f"{ACTOR}.clip_ratio_c": 10},
        "moe_grpo_seq_mis": {f"{ACTOR}.clip_ratio_low": 0.2, f"{ACTOR}.clip_ratio_high": 0.28},
        "sanity_gspo": {f"{ACTOR}.clip_ratio_low": 3e-4, f"{ACTOR}.clip_ratio_high": 4e-4},
    }.items():
        assert {key: OmegaConf.select(composed(name), key) for key in settings} == settings, name


# --- the optimizer ---------------------------------------------------------------------------------------------------


def built_of(optimizer_config: Any) -> tuple[torch.optim.Optimizer, float]:
    """verl's optimizer with this configuration, and by what its schedule multiplies the first step."""
    from verl.workers.config.optimizer import build_optimizer
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2))], optimizer_config)
    scheduler = FSDPEngine._build_lr_scheduler(
        types.SimpleNamespace(optimizer_config=optimizer_config, rank=1), optimizer
    )
    return optimizer, scheduler.get_last_lr()[0] / optimizer_config.lr


@pytest.mark.parametrize("name", ("sanity_grpo", "moe_pg_seq_tis", "octothinker_grpo", *OPTIMIZERS))
def test_the_workers_build_the_paper_s_optimizer(name, tiny_model):
    lr, betas, eps, decay, warm_up = OPTIMIZERS.get(name, PAPERS)
    optimizer_config = step_with(overridden(name, "v1"), "v1", tiny_model).optimizers["actor"]
    optimizer, first = built_of(optimizer_config)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (optimizer_config.lr, group["eps"], group["weight_decay"]) == (lr, eps, decay)
    assert tuple(group["betas"]) == betas
    assert optimizer_config.lr_warmup_steps == (warm_up or -1)
    assert first == (0.0 if warm_up else 1.0)


@pytest.mark.parametrize(("name", "actor", "critic"), (("cpu_ppo", 1e-4, 1e-3), ("gsm8k_ppo", 1e-6, 1e-5)))
def test_the_critic_has_a_learning_rate_of_its_own(name, actor, critic, tiny_model):
    optimizers = step_with(overridden(name, "v1"), "v1", tiny_model).optimizers
    rates = {role: built_of(config)[0].param_groups[0]["lr"] for role, config in optimizers.items()}
    assert rates == {"actor": actor, "critic": critic}


# --- DAPO ------------------------------------------------------------------------------------------------------------

# The recipe, and a question and a right answer that its reward function reads.
DAPO = {
    "cpu_dapo": (DATA_SOURCE, "7", "7"),
    "dapo_14b": ("DigitalLearningGmbH/MATH-lighteval", "7", r"so it is \boxed{7}"),
}


def scored(name: str, text: str, length: int) -> dict[str, Any]:
    """What the reward manager that verl loads for the recipe says of an answer of so many tokens."""
    from verl.protocol import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    source, truth, _ = DAPO[name]
    tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special_tokens: text)
    manager = load_reward_manager(overridden(name, "v1"), tokenizer)
    width = OmegaConf.select(composed(name), "data.max_response_length")
    mask = (torch.arange(width) < length).long()[None]
    data = DataProto.from_dict(
        {"responses": torch.ones(1, width, dtype=torch.int64), "attention_mask": mask},
        {"data_source": [source], "reward_model": [{"ground_truth": truth}], "extra_info": [{}]},
    )
    return manager.loop.run_until_complete(manager.run_single(data))


@pytest.mark.parametrize(
    ("name", "length", "penalty"),
    (
        ("cpu_dapo", 6, 0.0),
        ("cpu_dapo", 7, -0.5),
        ("cpu_dapo", 8, -1.0),
        ("dapo_14b", 16384, 0.0),
        ("dapo_14b", 18432, -0.5),
        ("dapo_14b", 20480, -1.0),
    ),
)
def test_answers_near_the_limit_are_worth_less(name, length, penalty):
    right = DAPO[name][2]
    for text, score in ((right, 1.0), ("no", 0.0)):
        result = scored(name, text, length)
        assert float(result["reward_score"]) == pytest.approx(score + penalty)
        metric = OmegaConf.select(composed(name), "algorithm.filter_groups.metric")
        assert result["reward_extra_info"][metric] == score, "what groups are filtered by is without the penalty"


def replay_buffer(name: str, **changes: Any) -> Any:
    from verl.trainer.ppo.v1 import get_trainer_cls

    config = overridden(name, "v1", changes)
    trainer = object.__new__(get_trainer_cls(config.trainer.v1.trainer_mode))
    trainer.config, trainer.trainer_mode = config, config.trainer.v1.trainer_mode
    return trainer._build_replay_buffer()


@pytest.mark.parametrize("name", DAPO)
def test_groups_of_one_score_are_filtered(name):
    """By verl's own replay buffer, which reads what the reward manager wrote."""
    from verl.trainer.ppo.v1 import replay_buffer as module

    right, longest = DAPO[name][2], OmegaConf.select(composed(name), "data.max_response_length")
    buffer = replay_buffer(name)
    assert type(buffer) is module.ReplayBuffer
    # Of "long" all are right, one of them with a penalty, which must not keep the group.
    answers = {"right": (right, right), "mixed": (right, "no"), "wrong": ("no", "no"), "long": (right, right)}
    fields, found = {}, buffer.partitions["train"]
    for group, texts in answers.items():
        for number, text in enumerate(texts):
            length = longest if (group, number) == ("long", 0) else 1
            found[f"{group}_{number}_0"] = {}
            info = scored(name, text, length)["reward_extra_info"]
            fields[f"{group}_{number}_0"] = {"reward_extra_info": info}
    buffer.finished_keys["train"] = set(answers)

    def kv_batch_get(keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, Any]:
        assert select_fields == ["extra_fields"]
        return {"extra_fields": [fields[key] for key in keys]}

    with mock.patch.object(module, "tq", types.SimpleNamespace(kv_batch_get=kv_batch_get)):
        filtered, _ = buffer._dapo_filtered_keys("train")
    assert filtered == {"right", "wrong", "long"}
    assert buffer.max_inflight_gen_batches == 3


def test_another_sampler_would_filter_nothing():
    """Why cpu_dapo takes the quickstart's away."""
    sampler = {"path": "pkg://verl_fp16.quickstart.replay_buffer", "name": "EagerReplayBuffer"}
    changes = {f"trainer.v1.sampler.custom_sampler.{key}": value for key, value in sampler.items()}
    assert replay_buffer("cpu_dapo", **changes).filter_groups_metric is None
    assert replay_buffer("cpu_grpo").filter_groups_metric is None
