"""Parameters and optimizer on the host between updates, and FSDP2's CPU offload policy, which has the gradients there
too: an overflow is seen, skipped without a trace, and goes through a checkpoint."""

from __future__ import annotations

import pytest
import torch
from gpu_ranks import needs, on_devices, settled_state

OFFLOADED = {"param_offload": True, "optimizer_offload": True}
# (strategy, engine's settings, where gradients are when they are unscaled, where weights are between updates)
CASES = {
    "fsdp": ("fsdp", OFFLOADED, "device", "cpu"),
    "fsdp2": ("fsdp2", OFFLOADED, "device", "cpu"),
    "fsdp2 policy": ("fsdp2", {"offload_policy": True}, "cpu", "cpu"),
    "fsdp2 parameters": ("fsdp2", {"param_offload": True}, "device", "cpu"),
    "fsdp optimizer": ("fsdp", {"optimizer_offload": True}, "device", "device"),
}


def run_calls(calls: dict[str, tuple]) -> dict:
    return {name: globals()[function](*arguments) for name, (function, *arguments) in calls.items()}


def skipped_and_resumed(model: str, strategy: str, settings: dict, folder: str) -> dict:
    """Updates 1 and 3 applied, 2 skipped; a checkpoint into a new engine; update 4 skipped and 5 applied in both."""
    from engines import PARAMETER, make_engine, same, train

    fault = {"target": "gradient", "parameter": PARAMETER, "rank": 0, "updates": [2, 4]}

    def engine():
        return make_engine(model, strategy, faults=[fault], engine=settings, scale={"growth_interval": 100})

    first = engine()
    places = _watch_gradients(first)
    train(first)
    before = settled_state(first)
    skipped = train(first)
    kept = same(before, settled_state(first))
    between = _devices(first)
    train(first)
    applied = settled_state(first)
    first.save_checkpoint(folder, global_step=3)
    resumed = engine()
    resumed.load_checkpoint(folder)
    loaded = settled_state(resumed)
    scalers = first.scaler.state_dict(), resumed.scaler.state_dict()
    ahead, again = ([train(one), train(one)] for one in (first, resumed))
    ends = settled_state(first), settled_state(resumed)
    return {
        "kept": kept,
        "learned": not same(before, applied),
        "skipped": skipped["skipped_steps"],
        "norm": skipped["grad_norm"],
        "gradients": places,
        "between": between,
        "loaded": same(applied, loaded),
        "scalers": scalers,
        "decisions": [[(m["skipped_steps"], m["loss_scale"]) for m in metrics] for metrics in (ahead, again)],
        "difference": _mean_difference(*ends),
        "moved": not same(applied, ends[0]),
    }


def _mean_difference(a: list, b: list) -> float:
    """Of the weights."""
    pairs = [(x, y) for (name, x), (_, y) in zip(a, b, strict=True) if name.endswith("weight")]
    x, y = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    return (x - y).abs().mean().item()


def _watch_gradients(engine) -> set[str]:
    """A set that takes up the kinds of device that gradients are on when they are unscaled."""
    from verl_fp16.loss_scaling import local_gradients

    unscale, places = engine.scaler.unscale_, set()

    def watched(optimizer):
        places.update(gradient.device.type for gradient in local_gradients(optimizer))
        unscale(optimizer)

    engine.scaler.unscale_ = watched
    return places


def _devices(engine) -> dict[str, set[str]]:
    """Kinds of device of the weights and of the moments, as they are between two updates."""
    groups = engine.optimizer.param_groups
    states = engine.optimizer.state.values()
    return {
        "weights": {p.device.type for group in groups for p in group["params"]},
        "moments": {value.device.type for state in states for key, value in state.items() if key.startswith("exp_avg")},
    }


@pytest.fixture(scope="module")
def ranks(tiny_model, device, world_size, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("saved")
    calls = {
        name: ("skipped_and_resumed", str(tiny_model), strategy, settings, str(folder / name.replace(" ", "-")))
        for name, (strategy, settings, _, _) in CASES.items()
    }
    return on_devices(world_size, run_calls, calls, folder=tmp_path_factory.mktemp("ranks"), device=device)


@needs("verl", "transformers")
@pytest.mark.parametrize("case", CASES)
def test_an_overflow_is_skipped_without_a_trace(ranks, device, case):
    for seen in (rank[case] for rank in ranks):
        assert seen["kept"] and seen["learned"]
        assert seen["skipped"] == [1.0] and seen["norm"] is None


@needs("verl", "transformers")
@pytest.mark.parametrize("case", CASES)
def test_everything_is_where_the_settings_put_it(ranks, device, case):
    """Else the tests around this one would say nothing of offloading."""
    _, settings, gradients, weights = CASES[case]
    for seen in (rank[case] for rank in ranks):
        assert seen["gradients"] == {device if gradients == "device" else gradients}
        assert seen["between"]["weights"] == {device if weights == "device" else weights}
        optimizer_away = settings.get("optimizer_offload") or settings.get("offload_policy")
        assert seen["between"]["moments"] == {"cpu" if optimizer_away else device}


@needs("verl", "transformers")
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_brings_back_weights_optimizer_and_scaler(ranks, case):
    for seen in (rank[case] for rank in ranks):
        assert seen["loaded"]
        saved, taken = seen["scalers"]
        assert taken == saved
        assert (saved["scale"], saved["skipped_total"], saved["applied_total"]) == (32768.0, 1, 2)
        ahead, again = seen["decisions"]
        assert again == ahead == [([1.0], [16384.0]), ([0.0], [16384.0])]
        assert seen["moved"]
        # Attention's backward pass on a GPU adds up in no fixed order; an update moves a weight by up to 1e-3.
        assert seen["difference"] < 1e-5
