"""verl's own trainer with the flag, end to end on a CPU: each row of the README's table of what runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from held import check_rollout_holds_masters, train_with_dumps
from releases import PATCHED
from shared_memory import left_shared_memory
from trainer import Run, train

from verl_fp16.quickstart.report import StepMetrics

TWO_RANKS = ("trainer.n_gpus_per_node=2", "actor_rollout_ref.actor.use_kl_loss=true")
CRITIC = ("algorithm.adv_estimator=gae", "critic.ppo_micro_batch_size_per_gpu=8", "critic.optim.lr=1e-4")
# +hardware=cpu sets FSDP2 for each role by itself.
FSDP1 = tuple(
    f"actor_rollout_ref.{role}.{key}=fsdp" for role in ("actor", "ref") for key in ("strategy", "fsdp_config.strategy")
)


def check_fp16_step(step: dict[str, float], prefix: str = "actor/") -> None:
    """What every step with the flag logs, with step-level meaning."""
    assert step[prefix + "loss_scale"] == 1024.0, "as set in trainer.SMALL"
    assert step[prefix + "skipped_steps"] == 0.0
    assert 0 < step[prefix + "grad_norm"] < math.inf, "something was learned from"


def check_gap(step: dict[str, float]) -> None:
    """FP16 on both sides: the gap is there and is FP16's."""
    assert 0 < step["mismatch/log_prob_abs_diff_mean"] < 2e-3
    assert 0 < step["mismatch/k3"] < 1e-5
    assert step["mismatch/nonfinite_rollout"] == step["mismatch/nonfinite_training"] == step["mismatch/alarms"] == 0
    assert step["mismatch/train_dtype/float16"] == step["mismatch/rollout_dtype/float16"] == 1
    assert 0 < step["training/rollout_probs_diff_mean"] < 1e-3


def check_read_back(run: Run, *roles: str, ranks: int, kind: str) -> None:
    """Every rank of ``roles``, the servers and the rollout's workers reported, and run as declared."""
    assert run.read_back["differences"] == []
    reports = [process["report"] for process in run.read_back["processes"]]
    assert len(reports) == 1 + 3 * ranks, "the trainer; a rank, a server and a worker for each rank"
    assert len({report["pid"] for report in reports}) == len(reports), "each spoke for itself"
    trained = [report for report in reports if set(report["roles"]) - {"rollout"}]
    assert [report["rank"] for report in trained] == list(range(ranks))
    for report in trained:
        assert set(report["roles"]) == set(roles)
        for role, fields in report["roles"].items():
            assert (fields["autocast"], fields["fsdp_param"], fields["fsdp"]) == ("float16", ["float16"], [kind])
            assert (fields["scaler"] is None) == (role == "ref")
    rolled_out = [report["roles"]["rollout"] for report in reports if "rollout" in report["roles"]]
    assert len(rolled_out) == ranks
    for fields in rolled_out:
        assert (fields["model_dtype"], fields["parameters"], fields["kv_cache"]) == ("float16", *[["float16"]] * 2)
    assert "What runs, read back before the first rollout" in run.log


def check_nothing_left(run: Run) -> None:
    assert run.result.ok, run.result.cause
    check_clean(run)


def check_clean(run: Run) -> None:
    assert run.result.left_alive == ()
    # A zombie has ended, and waits only for whoever started it to look.
    mine = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    assert [p for p in mine if "ray" in p.name() or "VLLM" in p.name()] == []
    assert left_shared_memory() == []


@pytest.fixture(scope="module")
def two_ranks(tiny_model: Path, tmp_path_factory) -> Run:
    """FSDP2 on two ranks, reference policy with KL, validation, a checkpoint: one run for several tests."""
    return train_with_dumps(
        tmp_path_factory.mktemp("two-ranks"),
        tiny_model,
        *TWO_RANKS,
        "trainer.val_before_train=true",
        "trainer.save_freq=2",
    )


def test_fsdp2_two_ranks_reference_validation(two_ranks):
    check_nothing_left(two_ranks)
    check_read_back(two_ranks, "actor", "ref", ranks=2, kind="FSDP2")
    for number in (1, 2):
        step = two_ranks.step(number)
        check_fp16_step(step)
        check_gap(step)
        assert math.isfinite(step["actor/kl_loss"])
    assert any(name.startswith("val-core/") for name in two_ranks.step(0))


def test_both_rollouts_hold_the_masters(two_ranks):
    check_rollout_holds_masters(two_ranks, ranks=2)


def test_checkpoint_has_every_rank(two_ranks):
    saved = two_ranks.folder / "checkpoints" / "global_step_2" / "actor"
    assert {path.name for path in saved.glob("model_world_size_2_rank_*.pt")} == {
        "model_world_size_2_rank_0.pt",
        "model_world_size_2_rank_1.pt",
    }


def with_observer(save_at: str, stop_at: int) -> dict:
    return {"env": {"SEAM_SAVE_AT": save_at, "SEAM_STOP_AT": str(stop_at)}}


def check_stopped_by_observer(run: Run, step: int) -> None:
    """The step's metrics are logged, then the run ends, of itself, with one error that says who and why."""
    assert not run.result.ok
    assert run.result.returncode == 1, "it ended by itself"
    said = f"TrainingStopped: training was stopped at step {step} by seam_observer.watch: the test has seen enough"
    assert said in run.result.cause
    check_clean(run)
    for entry in run.metrics:
        seen = None if "training/global_step" not in entry.data else float(entry.step)
        assert entry.data.get("seam/step") == seen, "every training step, and no validation before it"
    assert run.metrics[-1].step == step


def test_resumed_from_the_checkpoint_an_observer_saves_and_stops(two_ranks, tiny_model):
    # The log goes on where the checkpoint is, not where the first run had come to.
    log = two_ranks.folder / "metrics-6.jsonl"
    log.write_bytes(
        (two_ranks.folder / "metrics-2.jsonl").read_bytes() + b'{"step":3,"data":{"lost":1}}\n{"step":4,"da'
    )
    run = train(
        two_ranks.folder,
        tiny_model,
        *TWO_RANKS,
        "trainer.resume_mode=auto",
        "trainer.val_before_train=true",
        "trainer.save_freq=4",
        "actor_rollout_ref.model.external_lib=seam_observer",
        steps=6,
        **with_observer("3,4", stop_at=4),
    )
    kept = (two_ranks.folder / "metrics-2.jsonl").read_bytes().splitlines()
    lines = log.read_bytes().splitlines()
    assert lines[: len(kept)] == kept
    mark, *anew = map(json.loads, lines[len(kept) :])
    assert mark == {"step": 2, "data": {"verl_fp16/resumed_from_step": 2}}
    run = replace(run, metrics=[StepMetrics(**entry) for entry in anew])
    check_stopped_by_observer(run, step=4)
    assert [entry.step for entry in run.metrics] == [2, 3, 4], "the validation; steps 1 and 2 are not repeated"
    for number in (3, 4):
        check_fp16_step(run.step(number))
        check_gap(run.step(number))
        assert (run.folder / "checkpoints" / f"global_step_{number}" / "actor").is_dir()
        assert run.log.count(f"Saving checkpoint to {run.folder}/checkpoints/global_step_{number}") == 1


def test_legacy_trainer_with_critic_and_reference_and_an_observer(tiny_model, tmp_path):
    run = train(
        tmp_path,
        tiny_model,
        *CRITIC,
        "trainer.use_v1=false",
        "trainer.val_before_train=true",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.model.external_lib=seam_observer",
        steps=4,
        **with_observer("1", stop_at=2),
    )
    check_stopped_by_observer(run, step=2)
    check_read_back(run, "actor", "ref", "critic", ranks=1, kind="FSDP2")
    assert [entry.step for entry in run.metrics] == [0, 1, 2]
    for number in (1, 2):
        check_fp16_step(run.step(number))
        check_gap(run.step(number))
    saved = sorted(path.name for path in (run.folder / "checkpoints").glob("global_step_*"))
    assert saved == ["global_step_1"]


def train_with(plants: str, folder: Path, model: Path, *overrides: str) -> Run:
    library = "actor_rollout_ref.model.external_lib=plants"
    return train(folder, model, "trainer.n_gpus_per_node=2", library, *overrides, env={"PLANTS": plants})


def check_refused(run: Run, *said: str) -> None:
    assert run.result.returncode == 1, "it ended by itself"
    check_clean(run)
    assert run.metrics == [], "no validation, no step"
    for part in said:
        assert part in run.log


def test_faults_in_single_processes_end_the_run_before_the_first_rollout(tiny_model, tmp_path):
    plants = "train_rank_1_in_bf16,roll_out_replica_0_in_bf16,leave_the_package_out_of_replica_1s_worker"
    run = train_with(plants, tmp_path, tiny_model, "trainer.val_before_train=true")
    check_refused(run)
    assert "ReadBackError: what runs is not what was declared (training float16, rollout float16)" in run.result.cause
    found = run.read_back["differences"]
    for who, what in (
        ("actor rank 1 (host ", "autocast is bfloat16, declared float16"),
        ("actor rank 1 (host ", "fsdp_param is bfloat16, declared float16"),
        ("actor rank 1 (host ", "scaler is None, declared LossScaler"),
        ("rollout replica 0, worker 0: rollout rank 0 (host ", "model_dtype is bfloat16, declared float16"),
        ("rollout replica 0, worker 0: rollout rank 0 (host ", "parameters is bfloat16, declared float16"),
        ("rollout replica 0, worker 0: rollout rank 0 (host ", "kv_cache is bfloat16, declared float16"),
        ("rollout replica 1 (host ", "did not report"),
    ):
        assert [line for line in found if line.startswith(who) and what in line], (who, what, found)
    named = ("actor rank 1 ", "rollout replica 0, worker 0: ", "rollout replica 1 ")
    assert all(line.startswith(named) for line in found), found


@pytest.mark.slow
def test_a_silent_rank_ends_the_run_after_the_timeout(tiny_model, tmp_path):
    run = train_with("silence_rank_1", tmp_path, tiny_model, "verl_fp16.read_back_timeout_s=15")
    silent = "did not report: no answer within 15 s (verl_fp16.read_back_timeout_s)"
    check_refused(run, "training worker 1 of 2 (host ", silent)
    assert len(run.read_back["differences"]) == 1


def test_fsdp1_with_critic_and_reference_on_a_verl_patched_in_its_source(tiny_model, tmp_path):
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
        release=PATCHED,
    )
    check_nothing_left(run)
    check_read_back(run, "actor", "ref", "critic", ranks=1, kind="FSDP1")
    for process in run.read_back["processes"]:
        assert {status.partition(":")[0] for status in process["report"]["hooks"].values()} <= {"not needed", "pending"}
    for number in (1, 2):
        check_fp16_step(run.step(number))
        check_gap(run.step(number))
        assert run.step(number)["critic/loss_scale"] == 4096.0, "the critic's own scaler"
        assert math.isfinite(run.step(number)["critic/grad_norm"])


def test_lora(tiny_model, tmp_path):
    lora = ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_alpha=16")
    run = train_with_dumps(tmp_path, tiny_model, *lora)
    check_nothing_left(run)
    check_rollout_holds_masters(run, ranks=1, lora_scaling=2.0)
    check_read_back(run, "actor", ranks=1, kind="FSDP2")
    for number in (1, 2):
        check_fp16_step(run.step(number))
        check_gap(run.step(number))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ("bf16", "bf16_train_fp16_rollout", "bf16_train_fp32_rollout", "fp32"))
def test_siblings_run(tiny_model, tmp_path, precision):
    run = train(tmp_path, tiny_model, f"precision={precision}")
    check_nothing_left(run)
    assert "actor/loss_scale" not in run.step(2), "no scaler outside of FP16"
    assert run.step(2)["mismatch/nonfinite_rollout"] == 0


@pytest.mark.slow
def test_fsdp2_two_ranks_with_critic(tiny_model, tmp_path):
    run = train(tmp_path, tiny_model, *CRITIC, "trainer.n_gpus_per_node=2")
    check_nothing_left(run)
    check_read_back(run, "actor", "critic", ranks=2, kind="FSDP2")
    check_fp16_step(run.step(2))
    assert run.step(2)["critic/loss_scale"] == 1024.0, "it follows the actor's"


@pytest.mark.slow
def test_fsdp1_two_ranks_with_reference_and_checkpoint(tiny_model, tmp_path):
    run = train(tmp_path, tiny_model, *FSDP1, *TWO_RANKS, "trainer.save_freq=2")
    check_nothing_left(run)
    check_read_back(run, "actor", "ref", ranks=2, kind="FSDP1")
    check_fp16_step(run.step(2))
    check_gap(run.step(2))
    assert (tmp_path / "checkpoints" / "global_step_2" / "actor").is_dir()
