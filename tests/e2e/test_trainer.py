"""verl's own trainer with the flag, end to end on a CPU: each row of the README's table of what runs."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import pytest
from shared_memory import left_shared_memory
from trainer import Run, train

TWO_RANKS = ("trainer.n_gpus_per_node=2", "actor_rollout_ref.actor.use_kl_loss=true")
CRITIC = ("algorithm.adv_estimator=gae", "critic.ppo_micro_batch_size_per_gpu=8", "critic.optim.lr=1e-4")
FSDP1 = ("actor_rollout_ref.actor.strategy=fsdp", "actor_rollout_ref.actor.fsdp_config.strategy=fsdp")


def check_fp16_step(step: dict[str, float], prefix: str = "actor/") -> None:
    """What every step with the flag logs, with step-level meaning."""
    assert step[prefix + "loss_scale"] == 65536.0
    assert step[prefix + "skipped_steps"] == 0.0
    assert 0 < step[prefix + "grad_norm"] < math.inf, "something was learned from"


def check_gap(step: dict[str, float]) -> None:
    """FP16 on both sides: the gap is there and is FP16's."""
    assert 0 < step["mismatch/log_prob_abs_diff_mean"] < 2e-3
    assert 0 < step["mismatch/k3"] < 1e-5
    assert step["mismatch/left_out_tokens"] == 0
    assert 0 < step["training/rollout_probs_diff_mean"] < 1e-3


def check_nothing_left(run: Run) -> None:
    assert run.result.ok, run.result.cause
    assert run.result.left_alive == ()
    mine = psutil.Process().children(recursive=True)
    assert [p for p in mine if "ray" in p.name() or "VLLM" in p.name()] == []
    assert left_shared_memory() == []


@pytest.fixture(scope="module")
def two_ranks(tiny_model: Path, tmp_path_factory) -> Run:
    """FSDP2 on two ranks, reference policy with KL, validation, a checkpoint: one run for several tests."""
    return train(
        tmp_path_factory.mktemp("two-ranks"),
        tiny_model,
        *TWO_RANKS,
        "trainer.val_before_train=true",
        "trainer.save_freq=2",
    )


def test_fsdp2_two_ranks_reference_validation(two_ranks):
    check_nothing_left(two_ranks)
    for number in (1, 2):
        step = two_ranks.step(number)
        check_fp16_step(step)
        check_gap(step)
        assert math.isfinite(step["actor/kl_loss"])
    assert any(name.startswith("val-core/") for name in two_ranks.step(0))


def test_the_rollout_is_fp16_and_the_flag_reached_every_process(two_ranks):
    assert "'dtype': 'float16'" in two_ranks.log, "the rollout's configuration"
    saved = two_ranks.folder / "checkpoints" / "global_step_2" / "actor"
    assert {path.name for path in saved.glob("model_world_size_2_rank_*.pt")} == {
        "model_world_size_2_rank_0.pt",
        "model_world_size_2_rank_1.pt",
    }


def test_checkpoint_is_resumed(two_ranks, tiny_model):
    run = train(two_ranks.folder, tiny_model, *TWO_RANKS, "trainer.resume_mode=auto", steps=3)
    check_nothing_left(run)
    assert [entry.step for entry in run.metrics if entry.step > 0] == [3], "steps 1 and 2 are not repeated"
    check_fp16_step(run.step(3))
    check_gap(run.step(3))


def test_fsdp1_with_critic_and_reference(tiny_model, tmp_path):
    run = train(
        tmp_path,
        tiny_model,
        *FSDP1,
        "critic.strategy=fsdp",
        "critic.fsdp.strategy=fsdp",
        *CRITIC,
        "verl_fp16.critic_loss_scale.init=4096",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "trainer.save_freq=2",
    )
    check_nothing_left(run)
    for number in (1, 2):
        check_fp16_step(run.step(number))
        check_gap(run.step(number))
        assert run.step(number)["critic/loss_scale"] == 4096.0, "the critic's own scaler"
        assert math.isfinite(run.step(number)["critic/grad_norm"])


def test_lora(tiny_model, tmp_path):
    run = train(tmp_path, tiny_model, "actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_alpha=16")
    check_nothing_left(run)
    for number in (1, 2):
        check_fp16_step(run.step(number))
        check_gap(run.step(number))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ("bf16", "bf16_train_fp16_rollout", "bf16_train_fp32_rollout", "fp32"))
def test_siblings_run(tiny_model, tmp_path, precision):
    run = train(tmp_path, tiny_model, f"precision={precision}")
    check_nothing_left(run)
    assert "actor/loss_scale" not in run.step(2), "no scaler outside of FP16"
    assert run.step(2)["mismatch/left_out_tokens"] == 0


@pytest.mark.slow
def test_fsdp2_two_ranks_with_critic(tiny_model, tmp_path):
    run = train(tmp_path, tiny_model, *CRITIC, "trainer.n_gpus_per_node=2")
    check_nothing_left(run)
    check_fp16_step(run.step(2))
    assert run.step(2)["critic/loss_scale"] == 65536.0


@pytest.mark.slow
def test_fsdp1_two_ranks_with_reference_and_checkpoint(tiny_model, tmp_path):
    run = train(tmp_path, tiny_model, *FSDP1, *TWO_RANKS, "trainer.save_freq=2")
    check_nothing_left(run)
    check_fp16_step(run.step(2))
    check_gap(run.step(2))
    assert (tmp_path / "checkpoints" / "global_step_2" / "actor").is_dir()
