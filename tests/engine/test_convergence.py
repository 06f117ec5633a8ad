"""Gradients that vanish in FP16 without a loss scale train as in FP32 with it."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks

SEQUENCES = [[(start * 7 + 3 * step * step) % 250 for step in range(9)] for start in range(8)]
# A loss this small has gradients around 1e-9 in the hidden states: below FP16's smallest number, 6e-8.
FACTOR = 1e-6
UPDATES = 60


def learn(model: str, dtype: str, scale: dict | None) -> dict:
    from verl_fp16 import standalone

    torch.manual_seed(0)
    engine = standalone.build_engine(
        model,
        precision=standalone.mixed_precision(dtype, loss_scale=scale),
        # AdamW's eps is for gradients of ordinary size.
        optimizer={"lr": 1e-3, "weight_decay": 0.0, "override_optimizer_config": {"eps": 1e-8 * FACTOR}},
    )

    def small_loss(model_output, data, dp_group=None):
        loss, metrics = standalone.next_token_loss(model_output, data)
        return loss * FACTOR, metrics

    vanished: list[float] = []
    step = engine.optimizer_step

    def counted_step() -> float:
        if not vanished:
            vanished.extend(float((p.grad.to_local() == 0).float().mean()) for p in engine.module.parameters())
        return step()

    engine.optimizer_step = counted_step
    for _ in range(UPDATES):
        standalone.train_step(engine, standalone.make_batch(SEQUENCES), loss=small_loss)
    rows = standalone.teacher_forced_log_probs(engine, SEQUENCES, len(SEQUENCES))
    return {"loss": -torch.cat(rows).mean().item(), "vanished": sum(vanished) / len(vanished)}


def three_ways(model: str) -> dict:
    return {
        "fp32": learn(model, "float32", None),
        "scaled": learn(model, "float16", None),
        "unscaled": learn(model, "float16", {"mode": "static", "init": 1.0}),
    }


@pytest.fixture(scope="module")
def learned(tiny_model, tmp_path_factory) -> dict:
    return on_ranks(1, three_ways, str(tiny_model), folder=tmp_path_factory.mktemp("convergence"))[0]


def test_without_a_scale_the_gradients_vanish_and_little_is_learned(learned):
    assert learned["fp32"]["vanished"] < 0.2 < 0.8 < learned["unscaled"]["vanished"]
    assert learned["unscaled"]["loss"] > 1.2 * learned["fp32"]["loss"]


def test_with_the_scale_fp16_learns_as_fp32_does(learned):
    assert learned["scaled"]["vanished"] == pytest.approx(learned["fp32"]["vanished"], abs=0.05)
    assert learned["scaled"]["loss"] == pytest.approx(learned["fp32"]["loss"], rel=0.01)
    assert learned["fp32"]["loss"] < 4, "something was learned: it began at 5.6"
