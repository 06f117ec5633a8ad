"""torch.compile as verl uses it, for the entropy: on and off, the loss falls and the scaler decides alike."""

from __future__ import annotations

import pytest
from gpu_ranks import needs, on_devices

pytestmark = needs("verl", "transformers")

STEPS = 6


def trained(model: str, strategy: str, compiled: bool) -> dict:
    """Updates with an entropy bonus, the third with an overflow; the scale grows after every second one without."""
    from engines import PARAMETER, make_engine, mine
    from verl.utils import tensordict_utils as tu

    from verl_fp16 import standalone

    engine = make_engine(
        model,
        strategy,
        faults=[{"target": "gradient", "parameter": PARAMETER, "updates": [3]}],
        scale={"init": 1024.0, "growth_interval": 2},
        engine={"use_torch_compile": compiled},
    )
    losses: list[float] = []

    def loss(model_output, data, dp_group=None):
        value, metrics = standalone.next_token_loss(model_output, data, dp_group)
        entropy = model_output["entropy"].values().sum() / data["batch_num_tokens"] * data["dp_size"]
        losses.append(value.item())
        return value - 0.01 * entropy, metrics

    decisions = []
    for _ in range(STEPS):
        batch = standalone.make_batch(mine())
        tu.assign_non_tensor(batch, calculate_entropy=True)
        metrics = standalone.train_step(engine, batch, loss=loss)
        decisions.append((metrics["skipped_steps"], metrics["loss_scale"]))
    optimized = hasattr(engine.compute_entropy_from_logits, "_torchdynamo_orig_callable")
    return {"losses": losses, "decisions": decisions, "compiled": optimized}


def both(model: str) -> dict:
    return {
        (strategy, compiled): trained(model, strategy, compiled)
        for strategy in ("fsdp", "fsdp2")
        for compiled in (False, True)
    }


@pytest.fixture(scope="module")
def runs(tiny_model, device, tmp_path_factory) -> dict:
    return on_devices(1, both, str(tiny_model), folder=tmp_path_factory.mktemp("ranks"), device=device)[0]


@pytest.mark.parametrize("strategy", ("fsdp", "fsdp2"))
def test_the_loss_falls_and_the_scaler_decides_alike(runs, strategy):
    eager, compiled = runs[strategy, False], runs[strategy, True]
    assert (eager["compiled"], compiled["compiled"]) == (False, True)
    scales = [1024.0, 2048.0, 1024.0, 1024.0, 2048.0, 2048.0]
    skips = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    expected = [([skip], [scale]) for skip, scale in zip(skips, scales, strict=True)]
    assert eager["decisions"] == compiled["decisions"] == expected
    for run in (eager, compiled):
        assert len(run["losses"]) == STEPS
        assert run["losses"][-1] < run["losses"][0] - 1e-3
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-3)
