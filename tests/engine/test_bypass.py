"""Bypass mode on the real engine: the gap of the first mini-batch, and tokens without a rollout log-probability."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from engines import make_engine, mine, run_calls, same, state_of
from ranks import on_ranks

PREFIX = "mismatch_first_update/"
PROMPT = 3


def make_batch(rollout: list[torch.Tensor], *, last_of_step: bool):
    """A mini-batch of two micro-batches as verl's actor gets it: all that is jagged is so by response."""
    from verl_fp16 import standalone

    def jagged(rows):
        return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)

    sequences = mine()
    responses = [torch.tensor(sequence[PROMPT:]) for sequence in sequences]
    tensors = {
        "prompts": jagged(torch.tensor(sequence[:PROMPT]) for sequence in sequences),
        "responses": jagged(responses),
        "response_mask": jagged(torch.ones(len(row), dtype=torch.int64) for row in responses),
        "old_log_probs": jagged(rollout),
        "advantages": jagged(torch.linspace(-1, 1, len(row)) for row in responses),
    }
    micro = max(1, len(sequences) // 2)
    return standalone.make_batch(sequences, micro_batch_size=micro, last_of_step=last_of_step, **tensors)


def make_bypassing_engine(model: str, strategy: str, bypass: bool = True):
    engine = make_engine(model, strategy, scale={"init": 1024.0})
    engine.engine_config.mixed_precision["verl_fp16"]["bypass_mode"] = bypass
    return engine


def training_log_probs(engine) -> list[torch.Tensor]:
    from verl_fp16 import standalone

    found = standalone.teacher_forced_log_probs(engine, mine(), max(1, len(mine()) // 2))
    return [row[PROMPT - 1 :] for row in found]


def actor_loss(engine, mode: str):
    """verl's own loss, with the configuration that an actor's worker has."""
    from omegaconf import OmegaConf
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    correction = {"bypass_mode": True, "loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 2.0}
    config = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        fsdp_config=engine.engine_config,
        policy_loss=OmegaConf.create({"loss_mode": mode, "rollout_correction": correction}),
    )
    return partial(ppo_loss, config)


def first_mini_batches(model: str, strategy: str) -> dict:
    """Two training steps of two mini-batches, and what their gap should be by another pass."""
    from verl_fp16 import standalone

    engine = make_bypassing_engine(model, strategy)
    before = training_log_probs(engine)
    generator = torch.Generator().manual_seed(1)
    rollout = [row + 1e-2 * torch.randn(len(row), generator=generator) for row in before]
    rollout[0][1] = -math.inf
    logged, expected = [], []
    for number in range(4):
        expected.append((rollout, training_log_probs(engine)))
        batch = make_batch(rollout, last_of_step=number % 2 == 1)
        logged.append(standalone.train_step(engine, batch, loss=actor_loss(engine, "vanilla")))
    return {"logged": logged, "expected": expected, "kept": len(engine._verl_fp16_first_mini_batch.measured)}


def with_a_bad_token(model: str, strategy: str, mode: str, bad: float, bypass: bool) -> dict:
    """Two tokens without a rollout log-probability, against the same tokens left out by hand."""
    import verl_fp16.required  # noqa: F401  as in every worker of a run with the flag
    from verl_fp16 import standalone

    states, moved = [], []
    for masked in (False, True):
        engine = make_bypassing_engine(model, strategy, bypass)
        before, rollout = state_of(engine), [row.clone() for row in training_log_probs(engine)]
        batch = make_batch(rollout, last_of_step=True)
        values = batch["response_mask" if masked else "old_log_probs"].values()
        values[0] = values[-1] = 0 if masked else bad
        standalone.train_step(engine, batch, loss=actor_loss(engine, mode))
        states.append(state_of(engine))
        moved.append(not same([pair for pair in before], states[-1][: len(before)]))
    return {"moved": moved, "as masked by hand": same(*states)}


BADS = (math.nan, math.inf, -math.inf)


def bad_token_calls(model: str) -> dict:
    cases = {
        f"{mode} {bad}": ("with_a_bad_token", model, "fsdp2", mode, bad, True)
        for mode in ("vanilla", "bypass_mode")
        for bad in BADS
    }
    return cases | {"unguarded": ("with_a_bad_token", model, "fsdp2", "vanilla", math.nan, False)}


@pytest.fixture(scope="module")
def one_rank(tiny_model, tmp_path_factory) -> list[dict]:
    calls = {"first": ("first_mini_batches", str(tiny_model), "fsdp2"), **bad_token_calls(str(tiny_model))}
    return on_ranks(1, run_calls, "test_bypass", calls, folder=tmp_path_factory.mktemp("bypass-1"))


@pytest.fixture(scope="module")
def two_ranks(tiny_model, tmp_path_factory) -> list[dict]:
    calls = {"first": ("first_mini_batches", str(tiny_model), "fsdp")}
    return on_ranks(2, run_calls, "test_bypass", calls, folder=tmp_path_factory.mktemp("bypass-2"))


@pytest.mark.parametrize("ranks", ("one_rank", "two_ranks"))
def test_the_gap_of_the_first_mini_batch_is_logged_once_a_step_over_all_ranks(ranks, request):
    from verl_fp16.mismatch.statistics import GapStatistics

    results = [answer["first"] for answer in request.getfixturevalue(ranks)]
    for number in (0, 2):
        whole = GapStatistics()
        for result in results:
            for rollout, training in zip(*result["expected"][number], strict=True):
                whole.add(rollout[None], training[None], torch.ones(1, len(rollout)))
        expected = whole.scalars()
        assert expected["nonfinite_rollout"] == len(results)
        for result in results:
            logged = result["logged"][number]
            found = {name.removeprefix(PREFIX): value for name, value in logged.items() if name.startswith(PREFIX)}
            assert found == {name: [pytest.approx(value, rel=1e-6, abs=1e-12)] for name, value in expected.items()}
    for result in results:
        totals = [logged.get("mismatch/nonfinite_rollout") for logged in result["logged"]]
        assert totals == [None, [2.0 * len(results)]] * 2, "of all mini-batches, on the last one"
        assert not [name for number in (1, 3) for name in result["logged"][number] if name.startswith(PREFIX)]
        assert result["kept"] == 2, "of one training step only"


def test_a_bad_rollout_token_is_left_out_of_the_loss(one_rank):
    (answer,) = one_rank
    for mode in ("vanilla", "bypass_mode"):
        for bad in BADS:
            assert answer[f"{mode} {bad}"] == {"moved": [True, True], "as masked by hand": True}, (mode, bad)
    assert answer["unguarded"]["moved"] == [False, True], "the loss would be nan, and its update skipped"
