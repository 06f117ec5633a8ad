"""verl's trainer on one GPU, with vLLM's CUDA graphs and its sleep between the rollouts: the weight sync is exact, and
rollout and training differ by FP16's roundings."""

from __future__ import annotations

import math

from gpu_ranks import needs

STEPS = 3
WITH_REFERENCE = ("actor_rollout_ref.actor.use_kl_loss=true",)
WITH_CRITIC = (
    *WITH_REFERENCE,
    "algorithm.adv_estimator=gae",
    "critic.ppo_micro_batch_size_per_gpu=8",
    "critic.optim.lr=1e-4",
    "verl_fp16.critic_loss_scale.init=4096",
)


def check(run, *roles: str) -> None:
    from gpu_trainer import VLLM_SAYS

    assert run.result.ok, run.result.cause
    assert run.result.left_alive == ()
    for what, line in VLLM_SAYS.items():
        assert line in run.log, f"vLLM says nothing of {what}"
    assert run.read_back["differences"] == []
    reports = [process["report"]["roles"] for process in run.read_back["processes"]]
    assert {role for report in reports for role in report} >= {*roles, "rollout"}
    (rollout,) = (report["rollout"] for report in reports if "rollout" in report)
    assert (rollout["model_dtype"], rollout["parameters"], rollout["kv_cache"]) == (
        "float16",
        ["float16"],
        ["float16"],
    )
    for number in range(1, STEPS + 1):
        step = run.step(number)
        assert step["sync/audit_ok"] == 1.0 and step["sync/overflow_values"] == 0
        assert step["actor/loss_scale"] == 1024.0 and step["actor/skipped_steps"] == 0
        assert 0 < step["actor/grad_norm"] < math.inf
        assert step["mismatch/train_dtype/float16"] == step["mismatch/rollout_dtype/float16"] == 1
        assert 0 < step["mismatch/log_prob_abs_diff_mean"] < 2e-3
        assert step["mismatch/nonfinite_rollout"] == step["mismatch/nonfinite_training"] == 0


@needs("verl", "vllm", "ray", "transformers")
def test_with_a_reference_policy(tiny_model, tmp_path):
    from gpu_trainer import train_on_gpu

    run = train_on_gpu(tmp_path, tiny_model, *WITH_REFERENCE, steps=STEPS)
    check(run, "actor", "ref")
    assert math.isfinite(run.step(STEPS)["actor/kl_loss"])


@needs("verl", "vllm", "ray", "transformers", "flash_attn")
def test_with_a_critic_and_a_reference_policy(tiny_model, tmp_path):
    """verl loads the critic with flash attention, whatever attn_implementation says."""
    from gpu_trainer import train_on_gpu

    run = train_on_gpu(tmp_path, tiny_model, *WITH_CRITIC, steps=STEPS)
    check(run, "actor", "ref", "critic")
    for number in range(1, STEPS + 1):
        assert run.step(number)["critic/loss_scale"] == 4096.0
        assert math.isfinite(run.step(number)["critic/grad_norm"])
