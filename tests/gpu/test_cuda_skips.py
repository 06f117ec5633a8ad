"""Skipped updates on GPUs: foreach and fused AdamW left to the bit, and ranks that agree over NCCL."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_ranks import needs, on_devices, settled_state

STRATEGIES = ("fsdp", "fsdp2")
ADAMS = {"foreach": {"foreach": True, "fused": False}, "fused": {"foreach": False, "fused": True}}


def run_calls(calls: dict[str, tuple]) -> dict:
    return {name: globals()[function](*arguments) for name, (function, *arguments) in calls.items()}


def skipped_by_an_engine(model: str, strategy: str, adam: dict, faulty_rank: int) -> dict:
    """Three updates, the second of them with an inf in one rank's gradients."""
    from engines import PARAMETER, make_engine, same, train

    fault = {"target": "gradient", "parameter": PARAMETER, "rank": faulty_rank, "updates": [2]}
    engine = make_engine(model, strategy, faults=[fault], optimizer={"override_optimizer_config": adam})
    assert {name: bool(engine.optimizer.defaults[name]) for name in adam} == adam
    states, metrics = [], []
    for _ in range(3):
        metrics.append(train(engine))
        states.append(settled_state(engine))
    first, second, third = states
    return {
        "kept": same(first, second),
        "learned": not same(second, third),
        "finite": all(bool(torch.isfinite(tensor).all()) for _, tensor in third),
        "counters": [sorted({float(t) for name, t in state if name.endswith(" step")}) for state in states],
        "skipped": [m["skipped_steps"] for m in metrics],
        "scales": [m["loss_scale"] for m in metrics],
        "norms": [m["grad_norm"] for m in metrics],
        "device": {p.device.type for group in engine.optimizer.param_groups for p in group["params"]},
    }


def agreed_by_scalers(device: str) -> list[tuple]:
    """Each rank in turn alone has a fault, or no gradient at all beside one; with both kinds of AdamW."""
    import torch.distributed as dist

    from verl_fp16.loss_scaling import LossScaler
    from verl_fp16.settings import LossScaleSettings

    found = []
    for faulty in range(dist.get_world_size()):
        for adam in ADAMS.values():
            for others_have_gradients in (True, False):
                weights = [torch.nn.Parameter(torch.ones(1000, device=device)) for _ in range(2)]
                optimizer = torch.optim.AdamW(weights, lr=0.1, **adam)
                scaler = LossScaler(LossScaleSettings(), device)
                if others_have_gradients or dist.get_rank() == faulty:
                    for weight in weights:
                        weight.grad = torch.ones_like(weight)
                if dist.get_rank() == faulty:
                    weights[1].grad[999] = torch.nan
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                untouched = all(bool((weight == 1).all()) for weight in weights) and not optimizer.state
                found.append((scaler.last_step_skipped, scaler.scale_value, untouched))
    return found


def clean_in_scalers(device: str) -> tuple:
    """No rank has a fault: the control."""
    from verl_fp16.loss_scaling import LossScaler
    from verl_fp16.settings import LossScaleSettings

    weight = torch.nn.Parameter(torch.ones(1000, device=device))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = LossScaler(LossScaleSettings(), device)
    weight.grad = torch.ones_like(weight)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return scaler.last_step_skipped, scaler.scale_value, bool((weight < 1).all())


@pytest.fixture(scope="module")
def ranks(tiny_model, device, world_size, tmp_path_factory) -> list[dict]:
    model, calls = str(tiny_model), {}
    for strategy in STRATEGIES:
        for name, adam in ADAMS.items():
            # The last rank: of one rank the only one.
            calls[f"{strategy} {name}"] = ("skipped_by_an_engine", model, strategy, adam, world_size - 1)
    calls["agreed"] = ("agreed_by_scalers", device)
    calls["clean"] = ("clean_in_scalers", device)
    return on_devices(world_size, run_calls, calls, folder=tmp_path_factory.mktemp("ranks"), device=device)


@needs("verl", "transformers")
@pytest.mark.parametrize("adam", ADAMS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_skip_leaves_weights_moments_and_step_counters_to_the_bit(ranks, device, strategy, adam):
    for seen in (rank[f"{strategy} {adam}"] for rank in ranks):
        assert seen["device"] == {device}
        assert seen["kept"] and seen["learned"] and seen["finite"]
        assert seen["counters"] == [[1.0], [1.0], [2.0]], "the skipped update is not counted"
        assert seen["skipped"] == [[0.0], [1.0], [0.0]]
        assert seen["scales"] == [[65536.0], [32768.0], [32768.0]]
        assert seen["norms"][1] is None and all(0 < seen["norms"][n] < math.inf for n in (0, 2))


@needs("verl", "transformers")
def test_a_fault_on_one_rank_skips_on_all(ranks):
    for rank in ranks:
        assert len(rank["agreed"]) == len(ranks) * len(ADAMS) * 2
        assert set(rank["agreed"]) == {(True, 32768.0, True)}
        assert rank["clean"] == (False, 65536.0, True)
