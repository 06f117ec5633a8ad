"""Whether what vLLM held was the trained weights in float16, bit for bit; from what ``sync_dump`` wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from trainer import Run, train

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# transformers packs experts as vLLM does, under other names.
_PACKED = {
    "experts.routed_experts.w13_weight": "experts.gate_up_proj",
    "experts.routed_experts.w2_weight": "experts.down_proj",
}


def train_with_dumps(folder: Path, model: Path, *overrides: str) -> Run:
    """:func:`trainer.train` with every sync audited, and dumped."""
    (dumps := folder / "dumps").mkdir(parents=True)
    env = {"SYNC_DUMP": str(dumps), "VERL_USE_EXTERNAL_MODULES": "sync_dump"}
    return train(folder, model, "verl_fp16.sync.audit_interval=1", *overrides, env=env)


def check_rollout_holds_masters(run: Run, ranks: int, lora_scaling: float | None = None) -> None:
    """Of a run of two steps: after the start and after each step. With ``lora_scaling`` of the adapters."""
    masters, held = dumped(run, "master"), dumped(run, "held")
    assert list(masters) == list(held) == [1, 2, 3]
    for sync in masters:
        assert len(held[sync]) == len(masters[sync]) == ranks
        for worker in held[sync]:
            if lora_scaling:
                check_adapters(worker, masters[sync][0], lora_scaling)
            else:
                check_held(worker, masters[sync][0])
    before, after = masters[1][0], masters[3][0]
    assert any(not torch.equal(before[name], after[name]) for name in before), "something was learned in between"
    assert "the first weight sync is audited" in run.log
    check_metrics(run.step(2), before, lora=bool(lora_scaling))


def dumped(run: Run, what: str) -> dict[int, list[dict[str, torch.Tensor]]]:
    """Number of the sync -> what each process held."""
    found: dict[int, list] = {}
    for path in sorted((run.folder / "dumps").glob(f"{what}-*.pt")):
        found.setdefault(int(path.stem.rpartition("-")[2]), []).append(torch.load(path))
    return found


def fused(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The master of a parameter of vLLM's: its parts, in vLLM's order, in float16."""
    name = name.replace(".base_layer.", ".")
    for theirs, packed in _PACKED.items():
        name = name.replace(theirs, packed)
    if name in state:
        return state[name].to(torch.float16)
    for whole, parts in _FUSED.items():
        if whole in name:
            return torch.cat([state[name.replace(whole, part)] for part in parts]).to(torch.float16)
    raise KeyError(name)


def check_held(held: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    state = {re.sub(r"^base_model\.model\.|\.base_layer", "", name): tensor for name, tensor in state.items()}
    parameters = {name: t for name, t in held.items() if name.endswith(("weight", "bias")) and "lora" not in name}
    assert len(parameters) > 10
    for name, tensor in parameters.items():
        master = fused(state, name)
        assert tensor.dtype == torch.float16
        if name.endswith(tuple(_PACKED)):
            assert any(same_bits(tensor, packed) for packed in packed_for_a_cpu(master)), name
            continue
        # vLLM pads the vocabulary with zeros.
        assert not tensor[len(master) :].any()
        assert same_bits(tensor[: len(master)], master), name


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def packed_for_a_cpu(experts: torch.Tensor) -> Iterator[torch.Tensor]:
    """In the order of each instruction set that vLLM's CPU build computes experts with on x86."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    for instructions in ("vec", "amx"):
        yield cpu_prepack_moe_weight(experts.contiguous(), instructions)


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


def check_metrics(step: dict[str, float], state: dict[str, torch.Tensor], lora: bool) -> None:
    assert step["sync/audit_ok"] == 1.0
    assert step["sync/overflow_values"] == 0
    assert step["sync/seconds"] > 0
    assert 0 < step["sync/max_abs_weight"] < 100
    assert 0 <= step["sync/unchanged_fraction"] <= step["sync/unchanged_fraction_bf16"] <= 1
    if not lora:
        assert step["sync/bytes"] == 2 * sum(tensor.numel() for name, tensor in state.items() if "lora_" not in name)
