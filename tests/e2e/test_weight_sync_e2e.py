"""The weight sync in verl's trainer: every path is exact, and each part of the audit sees its fault."""

from __future__ import annotations

import shutil

import pytest
from held import check_rollout_holds_masters, train_with_dumps
from safetensors.torch import load_file, save_file
from test_trainer import FSDP1, check_clean, check_nothing_left
from trainer import train

MERGED = (
    "actor_rollout_ref.model.lora_rank=8",
    "actor_rollout_ref.model.lora_alpha=16",
    "actor_rollout_ref.model.lora.merge=true",
)
TWO_RANKS = ("trainer.n_gpus_per_node=2",)

# FSDP2 on two ranks, and adapters, are checked in the runs of test_trainer.
CASES = {
    "merged lora": MERGED,
    "merged lora 2 ranks": (*MERGED, *TWO_RANKS),
    "fsdp2 1 rank": (),
    "fsdp1 1 rank": FSDP1,
    "fsdp1 2 ranks": (*FSDP1, *TWO_RANKS),
    "experts": (),
    "experts fsdp1 2 ranks": (*FSDP1, *TWO_RANKS),
}


@pytest.mark.parametrize(
    "case", [case if i < 1 else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(CASES)]
)
def test_vllm_holds_the_masters_in_float16(case, tiny_model, sharp_moe_model, tmp_path):
    run = train_with_dumps(tmp_path, sharp_moe_model if "experts" in case else tiny_model, *CASES[case])
    check_nothing_left(run)
    check_rollout_holds_masters(run, ranks=2 if "2 ranks" in case else 1)


@pytest.fixture(scope="module")
def opinionated_model(tiny_model, tmp_path_factory):
    """The tiny model with a head that makes some tokens likelier than others: by itself it is nearly indifferent, as
    vLLM's weights of the start are, and no probe could tell the two."""
    folder = tmp_path_factory.mktemp("models") / "opinionated"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


FAULTS = {
    "stale_packed_weight": "rollout replica 0 holds the weights and computes with others",
    "flipped_bit": "does not hold what it got: model.layers.1.mlp.gate_proj.weight (in model.layers.1.mlp.gate_up_proj",
    "swapped_experts": "has other values than actor rank 0 sent: model.layers.0.mlp.experts.1.gate_proj.weight, "
    "model.layers.0.mlp.experts.1.up_proj.weight, model.layers.0.mlp.experts.3.gate_proj.weight",
}


@pytest.mark.parametrize(
    "fault", [fault if i == 0 else pytest.param(fault, marks=pytest.mark.slow) for i, fault in enumerate(FAULTS)]
)
def test_a_run_with_a_fault_in_its_sync_stops_before_it_rolls_out(
    fault, tiny_model, tiny_moe_model, opinionated_model, tmp_path
):
    """Each is seen by one part of the audit; its message is the only one."""
    model = {"stale_packed_weight": opinionated_model, "swapped_experts": tiny_moe_model}.get(fault, tiny_model)
    env = {"SYNC_FAULT": fault, "VERL_USE_EXTERNAL_MODULES": "sync_faults"}
    run = train(tmp_path, model, env=env)
    assert run.result.returncode == 1, "it ended by itself"
    check_clean(run)
    assert run.metrics == []
    assert "WeightSyncError: verl_fp16: the rollout would not run the weights that were trained" in run.log
    assert "(sync 1 of this run)" in run.log
    assert [name for name, wanted in FAULTS.items() if wanted in run.log] == [fault]


@pytest.mark.slow
def test_tensor_parallel_workers_hold_their_slices(tiny_model, tmp_path):
    """One key/value head on two workers, which both hold it; all other weights are sliced."""
    tensor_parallel = "actor_rollout_ref.rollout.tensor_model_parallel_size=2"
    run = train(tmp_path, tiny_model, *TWO_RANKS, tensor_parallel, "verl_fp16.sync.audit_interval=1")
    check_nothing_left(run)
    assert "held as sent by 2 workers" in run.log
    assert run.step(1)["sync/audit_ok"] == run.step(2)["sync/audit_ok"] == 1.0
