"""The gap in verl's own trainer: a fault of the rollout that is planted, and bypass mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_trainer import check_clean, check_fp16_step, check_gap, check_nothing_left
from trainer import Run, train

STEPS, FAULT_FROM = 14, 11
BATCH = ("data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=8")
BYPASS = (
    "algorithm.rollout_correction.bypass_mode=true",
    "algorithm.rollout_correction.rollout_is=token",
    "actor_rollout_ref.actor.policy_loss.loss_mode=bypass_mode",
    "+actor_rollout_ref.actor.policy_loss.rollout_correction=${algorithm.rollout_correction}",
)
FIRST = "mismatch_first_update/"


def evidence_of(run: Run) -> dict[str, dict]:
    """Name of a step's folder -> its facts."""
    folder = run.folder / "checkpoints" / "verl_fp16" / "mismatch"
    return {path.name: json.loads((path / "facts.json").read_text()) for path in sorted(folder.glob("step_*"))}


def run_drill(folder: Path, model: Path, env: dict[str, str], *overrides: str) -> Run:
    return train(folder, model, *BATCH, *overrides, "verl_fp16.mismatch.evidence_interval=0", steps=STEPS, env=env)


def test_a_layer_rounded_to_bfloat16_in_the_rollout_is_told_and_leaves_its_tokens(sharp_model, tmp_path):
    env = {"VERL_USE_EXTERNAL_MODULES": "rollout_fault", "ROLLOUT_FAULT_FROM": str(FAULT_FROM)}
    run = run_drill(tmp_path, sharp_model, env, "verl_fp16.mismatch.on_alarm=stop")
    assert run.result.returncode == 1, "it ended by itself"
    alarmed = run.metrics[-1].step
    assert FAULT_FROM <= alarmed < FAULT_FROM + 3
    assert [entry.data["mismatch/alarms"] for entry in run.metrics] == [0.0] * (alarmed - 1) + [1.0]
    assert f"training was stopped at step {alarmed}" in run.result.cause
    assert "mismatch/k3 is" in run.result.cause and "alarm_k3_jump" in run.result.cause
    assert (run.folder / "checkpoints" / f"global_step_{alarmed}" / "actor").is_dir(), "a stop saves what there is"
    ((name, facts),) = evidence_of(run).items()
    assert name == f"step_{alarmed:06d}" and facts["alarm"] is True
    assert facts["scalars"]["mismatch/k3"] == run.step(alarmed)["mismatch/k3"]
    check_worst_tokens(run, facts)
    check_clean(run)


def check_worst_tokens(run: Run, facts: dict) -> None:
    import pyarrow.parquet as pq

    folder = run.folder / "checkpoints" / "verl_fp16" / "mismatch" / f"step_{facts['step']:06d}"
    tokens = pq.read_table(folder / "tokens.parquet").to_pylist()
    worst = max(abs(token["log_ratio"]) for token in tokens)
    assert abs(tokens[0]["log_ratio"]) == worst == pytest.approx(facts["scalars"]["mismatch/log_prob_abs_diff_max"])
    assert all(token["sample_id"] and token["text"] for token in tokens)
    sequences = pq.read_table(folder / "sequences.parquet").to_pylist()
    assert len(sequences) == 64 and sum(row["length"] for row in sequences) == facts["scalars"]["mismatch/tokens"]
    assert len({row["sample_id"] for row in sequences}) == 64


@pytest.mark.slow
def test_the_same_run_without_the_fault_raises_no_alarm(sharp_model, tmp_path):
    run = run_drill(tmp_path, sharp_model, {})
    check_nothing_left(run)
    assert [entry.data["mismatch/alarms"] for entry in run.metrics] == [0.0] * STEPS
    assert evidence_of(run) == {}


def check_bypass(run: Run) -> None:
    check_nothing_left(run)
    for number in (1, 2):
        step = run.step(number)
        check_fp16_step(step)
        assert 0 < step[f"{FIRST}k3"] < 1e-5 and 0 < step[f"{FIRST}log_prob_abs_diff_mean"] < 2e-3
        assert step[f"{FIRST}sequences"] == 16, "4 prompts of the first of two mini-batches, 4 answers each"
        assert step[f"{FIRST}nonfinite_rollout"] == 0
        assert step["mismatch/train_dtype/float16"] == step["mismatch/rollout_dtype/float16"] == 1
        assert "mismatch/k3" not in step and not [name for name in step if name.startswith("actor/mismatch")]
    assert evidence_of(run)["step_000002"]["sequences_seen"] == 16


def test_in_bypass_mode_the_gap_is_that_of_the_first_mini_batch_of_all_ranks(tiny_model, tmp_path):
    two = ("trainer.n_gpus_per_node=2", "verl_fp16.mismatch.evidence_interval=1")
    check_bypass(train(tmp_path, tiny_model, *BYPASS, *two))


@pytest.mark.slow
def test_in_bypass_mode_of_the_legacy_trainer(tiny_model, tmp_path):
    legacy = ("trainer.use_v1=false", "verl_fp16.mismatch.evidence_interval=1")
    check_bypass(train(tmp_path, tiny_model, *BYPASS, *legacy))


@pytest.mark.slow
def test_a_correction_of_the_loss_with_the_whole_batch(tiny_model, tmp_path):
    run = train(tmp_path, tiny_model, "algorithm.rollout_correction.rollout_is=token")
    check_nothing_left(run)
    for number in (1, 2):
        check_gap(run.step(number))
        assert run.step(number)["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=1e-3)
