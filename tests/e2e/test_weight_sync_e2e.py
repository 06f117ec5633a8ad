"""What vLLM holds is the trained weights in float16, bit for bit: verl's trainer, every path of the weight sync."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_trainer import FSDP1, check_clean, check_nothing_left
from trainer import Run, train

LORA = ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_alpha=16")
MERGED = (*LORA, "actor_rollout_ref.model.lora.merge=true")
TWO_RANKS = ("trainer.n_gpus_per_node=2",)

CASES = {
    "fsdp2 2 ranks": TWO_RANKS,
    "merged lora": MERGED,
    "fsdp2 1 rank": (),
    "fsdp1 1 rank": FSDP1,
    "fsdp1 2 ranks": (*FSDP1, *TWO_RANKS),
    "lora": LORA,
    "merged lora 2 ranks": (*MERGED, *TWO_RANKS),
}
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def run_with_dumps(folder: Path, model: Path, *overrides: str, release: str | None = None) -> Run:
    (dumps := folder / "dumps").mkdir(parents=True)
    env = {"SYNC_DUMP": str(dumps), "VERL_USE_EXTERNAL_MODULES": "sync_dump"}
    return train(folder, model, "verl_fp16.sync.audit_interval=1", *overrides, env=env, release=release)


def dumped(run: Run, what: str) -> dict[int, list[dict[str, torch.Tensor]]]:
    """Number of the sync -> what each process held."""
    found: dict[int, list] = {}
    for path in sorted((run.folder / "dumps").glob(f"{what}-*.pt")):
        found.setdefault(int(path.stem.rpartition("-")[2]), []).append(torch.load(path))
    return found


def fused(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The master of a parameter of vLLM's: its parts, in vLLM's order, in float16."""
    name = name.replace(".base_layer.", ".")
    for whole, parts in _FUSED.items():
        if whole in name:
            return torch.cat([state[name.replace(whole, part)] for part in parts]).to(torch.float16)
    return state[name].to(torch.float16)


def check_held(held: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    state = {re.sub(r"^base_model\.model\.|\.base_layer", "", name): tensor for name, tensor in state.items()}
    parameters = {name: t for name, t in held.items() if name.endswith(("weight", "bias")) and "lora" not in name}
    assert len(parameters) > 10
    for name, tensor in parameters.items():
        master = fused(state, name)
        assert tensor.dtype == torch.float16
        # vLLM pads the vocabulary with zeros.
        assert not tensor[len(master) :].any()
        assert torch.equal(tensor[: len(master)].view(torch.int16), master.view(torch.int16)), name


def check_adapters(held: dict[str, torch.Tensor], state: dict[str, torch.Tensor], scaling: float) -> None:
    """Adapters sit in slot 0 of vLLM's layers, the second one with the scaling multiplied in."""
    slots = {name: t for name, t in held.items() if "_stacked." in name}
    checked = 0
    for name, slot in slots.items():
        module, attribute, index = name.rsplit(".", 2)
        whole = module.rpartition(".")[2]
        parts = _FUSED.get(whole, (whole,))
        kind = "lora_A" if "lora_a" in attribute else "lora_B"
        part = module.removesuffix(whole) + parts[int(index)]
        master = state.get(f"base_model.model.{part}.{kind}.default.weight")
        if master is None:
            continue
        image = master.to(torch.float16)
        image = image * scaling if kind == "lora_B" else image
        there = slot[0, 0, : image.shape[0], : image.shape[1]]
        assert torch.equal(there.reshape(-1).view(torch.int16), image.reshape(-1).view(torch.int16)), name
        checked += 1
    assert checked > 10


@pytest.mark.parametrize(
    "case", [case if i < 2 else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(CASES)]
)
def test_vllm_holds_the_masters_in_float16(case, tiny_model, tmp_path):
    run = run_with_dumps(tmp_path, tiny_model, *CASES[case])
    check_nothing_left(run)
    masters, held = dumped(run, "master"), dumped(run, "held")
    ranks = 2 if "2 ranks" in case else 1
    assert list(masters) == list(held) == [1, 2, 3], "after the start and after each of two steps"
    for sync in masters:
        assert len(held[sync]) == len(masters[sync]) == ranks
        for worker in held[sync]:
            if case == "lora":
                check_adapters(worker, masters[sync][0], scaling=2.0)
            else:
                check_held(worker, masters[sync][0])
    before, after = masters[1][0], masters[3][0]
    assert any(not torch.equal(before[name], after[name]) for name in before), "something was learned in between"
    step = run.step(2)
    assert step["sync/audit_ok"] == 1.0
    assert "the first weight sync is audited" in run.log
    check_metrics(step, before, lora=case == "lora")


def check_metrics(step: dict[str, float], state: dict[str, torch.Tensor], lora: bool) -> None:
    assert step["sync/overflow_values"] == 0
    assert step["sync/seconds"] > 0
    assert 0 < step["sync/max_abs_weight"] < 100
    assert 0 <= step["sync/unchanged_fraction"] <= step["sync/unchanged_fraction_bf16"] <= 1
    if not lora:
        assert step["sync/bytes"] == 2 * sum(tensor.numel() for name, tensor in state.items() if "lora_" not in name)


FAULTS = {
    "stale_packed_weight": "rollout replica 0 holds the weights and computes with others",
    "flipped_bit": "does not hold what it got: model.layers.1.mlp.gate_proj.weight (in model.layers.1.mlp.gate_up_proj",
    "swapped_on_the_way": "has other values than actor rank 0 sent: model.layers.0.mlp.gate_proj.weight, "
    "model.layers.0.mlp.up_proj.weight",
}


@pytest.mark.parametrize(
    "fault", [fault if i == 0 else pytest.param(fault, marks=pytest.mark.slow) for i, fault in enumerate(FAULTS)]
)
def test_a_run_with_a_fault_in_its_sync_stops_before_it_rolls_out(fault, tiny_model, tmp_path):
    """Each is seen by one part of the audit; its message is the only one."""
    env = {"SYNC_FAULT": fault, "VERL_USE_EXTERNAL_MODULES": "sync_faults"}
    run = train(tmp_path, tiny_model, env=env)
    assert run.result.returncode == 1, "it ended by itself"
    check_clean(run)
    assert run.metrics == []
    (said,) = re.findall(r"WeightSyncError: (verl_fp16: the rollout would not run.*\n.*)\n", run.result.cause + "\n")
    assert "(sync 1 of this run)" in said
    assert FAULTS[fault] in said
    others = [wanted for name, wanted in FAULTS.items() if name != fault]
    assert not any(wanted in run.log for wanted in others)
