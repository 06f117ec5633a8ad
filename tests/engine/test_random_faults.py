"""A thousand random faults in the real engine against runs that never saw the faulty mini-batches."""

from __future__ import annotations

import random

import pytest
import torch
from engines import STRATEGIES, make_engine, same, state_of
from ranks import on_ranks

# Of each strategy.
FAULTS, MINI_BATCHES = 520, 800


def loss_with_noise(model_output, data, dp_group=None):
    """A loss that draws random numbers, as dropout would."""
    from verl_fp16 import standalone

    loss, metrics = standalone.next_token_loss(model_output, data)
    return loss * (1 + torch.rand(())), metrics


def sequences_of(number: int) -> list[list[int]]:
    """The mini-batch of this number: two sequences of this rank's own."""
    import torch.distributed as dist

    drawn = random.Random(f"{number} {dist.get_rank()}")
    return [[drawn.randrange(250) for _ in range(drawn.randrange(3, 9))] for _ in range(2)]


def train(engine, number: int) -> None:
    from verl_fp16 import standalone

    batch = standalone.make_batch(sequences_of(number), last_of_step=number % 2 == 0)
    standalone.train_step(engine, batch, loss=loss_with_noise)
    if number % 2 == 0:
        engine.lr_scheduler_step()


def random_faults(engine, world_size: int) -> list[dict]:
    """One fault for each of the updates that are drawn, anywhere in the model that its rank holds."""
    import torch.distributed as dist

    from verl_fp16.attribution import named_local_gradients
    from verl_fp16.module_names import name_in_model

    mine: list[str] = []
    step = engine.optimizer_step

    def remembered_step():
        mine.extend(name_in_model(name) for name, part in named_local_gradients(engine.module) if part.numel())
        return step()

    engine.optimizer_step = remembered_step
    train(engine, 0)
    held: list = [None] * world_size
    dist.all_gather_object(held, mine)
    drawn = random.Random(7)
    faults = []
    for update in sorted(drawn.sample(range(1, MINI_BATCHES + 1), FAULTS)):
        rank = drawn.randrange(world_size)
        where = (
            {"target": "loss"}
            if drawn.random() < 0.1
            else {"target": "gradient", "parameter": drawn.choice(held[rank])}
        )
        faults.append({**where, "rank": rank, "updates": [update], "value": drawn.choice(["inf", "-inf", "nan"])})
    return faults


def faulty_and_clean(model: str, strategy: str, world_size: int) -> dict:
    settings = {"growth_interval": 2, "min": 0.25, "max": 65536.0, "max_consecutive_skips": 10**6}
    cosine = {"lr_scheduler_type": "cosine", "total_training_steps": MINI_BATCHES, "lr": 1e-4}
    faults = random_faults(make_engine(model, strategy, scale=settings), world_size)

    engine = make_engine(model, strategy, scale=settings, faults=faults, optimizer=cosine)
    torch.manual_seed(1)
    applied, scales = [], set()
    for number in range(1, MINI_BATCHES + 1):
        before = (torch.get_rng_state(), engine.scaler.scale_value, engine.optimizer.param_groups[0]["lr"])
        train(engine, number)
        scales.add(engine.scaler.scale_value)
        if not engine.scaler.last_step_skipped:
            applied.append((number, *before))

    clean = make_engine(model, strategy, scale={"mode": "static", "init": 1.0}, optimizer=cosine)
    for number, state, scale, rate in applied:
        torch.set_rng_state(state)
        clean.scaler._move_to(scale)
        for group in clean.optimizer.param_groups:
            group["lr"] = rate
        train(clean, number)
    return {
        "skipped": engine.scaler.total.skipped,
        "applied": len(applied),
        "of the clean run": clean.scaler.total.applied,
        "same": same(state_of(engine), state_of(clean)),
        "finite": all(bool(torch.isfinite(tensor).all()) for _, tensor in state_of(engine)),
        "scales": scales,
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_faults_leave_what_a_run_without_them_leaves(tiny_model, tmp_path, strategy):
    for seen in on_ranks(2, faulty_and_clean, str(tiny_model), strategy, 2, folder=tmp_path):
        assert seen["skipped"] >= FAULTS
        assert seen["applied"] == seen["of the clean run"] == MINI_BATCHES - seen["skipped"] > 200
        assert len(seen["scales"]) > 5
        assert seen["same"] and seen["finite"]
