"""A drill in verl's own trainer on two ranks: planted overflows, one burst of them, and at last no end to them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from test_trainer import check_clean, check_gap
from trainer import Run, train

PARAMETER = "model.layers.0.mlp.gate_proj.weight"
STEPS, UPDATES_A_STEP = 30, 2
SINGLE = [2, 5, 9, 13, 16, 32, 35, 39, 41, 46, 50, 55]
BURST = list(range(21, 29))  # four training steps without an update
LOSS = [43, 44]  # one training step
ENDLESS = list(range(61, 81))
SCALE = {"init": 1024.0, "min": 256.0, "growth_interval": 4, "max_consecutive_skips": 10}


def fault(**fields) -> str:
    return "{" + ",".join(f"{name}:{value}" for name, value in fields.items()) + "}"


def overrides() -> list[str]:
    gradient = {"target": "gradient", "parameter": PARAMETER}
    faults = [
        fault(**gradient, rank=0, updates=SINGLE[::2]),
        fault(**gradient, rank=1, updates=SINGLE[1::2], value="nan"),
        fault(**gradient, rank=0, updates=BURST),
        fault(**gradient, rank=1, updates=BURST + ENDLESS),
        fault(target="loss", rank=1, updates=LOSS, value="nan"),
    ]
    settings = [f"verl_fp16.loss_scale.{name}={value}" for name, value in SCALE.items()]
    return [*settings, f"verl_fp16.fault_injection=[{','.join(faults)}]"]


def expected() -> list[dict[str, float]]:
    """What the log has to say of each training step, by arithmetic."""
    scale, good, in_a_row, total, steps = SCALE["init"], 0, 0, 0, []
    overflows = {*SINGLE, *BURST, *ENDLESS}
    for step in range(35):
        skipped = 0
        for update in range(step * UPDATES_A_STEP + 1, (step + 1) * UPDATES_A_STEP + 1):
            faulty = update in overflows or update in LOSS
            skipped, total, in_a_row = skipped + faulty, total + faulty, in_a_row + 1 if faulty else 0
            if update in overflows:
                scale, good = max(scale / 2, SCALE["min"]), 0
            elif not faulty:
                good += 1
                if good == SCALE["growth_interval"]:
                    scale, good = scale * 2, 0
        steps.append(
            {
                "actor/loss_scale": scale,
                "actor/skipped_steps": skipped,
                "actor/applied_steps": UPDATES_A_STEP - skipped,
                "actor/skipped_total": total,
                "actor/consecutive_skips": in_a_row,
                "actor/skipped_forward_steps": float(step * UPDATES_A_STEP + 1 in LOSS) * UPDATES_A_STEP,
            }
        )
    return steps


@pytest.fixture(scope="module")
def drill(tiny_model: Path, tmp_path_factory) -> Run:
    return train(
        tmp_path_factory.mktemp("drill"),
        tiny_model,
        "trainer.n_gpus_per_node=2",
        *overrides(),
        steps=40,
        timeout_s=600,
        env={"VERL_FP16_ALLOW_FAULT_INJECTION": "1"},
    )


def test_every_step_of_the_drill_is_counted_right_and_finite(drill):
    assert len(SINGLE) + len(BURST) == 20
    for number, wanted in enumerate(expected(), 1):
        logged = drill.step(number)
        assert {name: logged.get(name) for name in wanted} == wanted, f"step {number}"
        assert all(math.isfinite(value) for value in logged.values()), f"step {number}"
        assert ("actor/grad_norm" in logged) == (wanted["actor/applied_steps"] > 0), f"step {number}"
        assert ("actor/loss" in logged) == (wanted["actor/skipped_forward_steps"] < UPDATES_A_STEP), f"step {number}"
        check_gap(logged)


def test_every_skip_of_the_drill_is_recorded_with_parameter_and_rank(drill):
    lines = (drill.folder / "checkpoints" / "verl_fp16" / "skips-actor.jsonl").read_text().splitlines()
    skips = {skip["update"]: skip for skip in map(json.loads, lines)}
    assert sorted(skips) == sorted([*SINGLE, *BURST, *LOSS, *ENDLESS[:10]])
    for update, skip in skips.items():
        assert skip["kind"] == ("forward" if update in LOSS else "gradient")
        if update in LOSS:
            assert skip["data_ranks"] == [1]
            continue
        ranks = [0, 1] if update in BURST else [1] if update in ENDLESS or update in SINGLE[1::2] else [0]
        assert [(g["parameter"], g["rank"]) for g in skip["gradients"]] == [(PARAMETER, rank) for rank in ranks]
    assert (
        f"actor update 2 skipped (loss scale 1024, now 512): the gradients overflowed: {PARAMETER} on rank 0: 1 inf"
        in (drill.log)
    )


def test_the_drill_ends_with_a_checkpoint_when_the_scale_can_go_no_lower(drill):
    assert drill.result.returncode == 1, "it ended by itself"
    check_clean(drill)
    assert drill.metrics[-1].step == 35
    cause = drill.result.cause
    assert "TrainingStopped: training was stopped at step 35 by verl_fp16.hooks.stuck_scale.stop_when_stuck" in cause
    assert "10 updates of the actor in a row were skipped" in cause and "the loss scale 256 goes no lower" in cause
    assert f"{PARAMETER} on rank 1: 1 inf" in drill.log.partition("The newest: actor update 70 skipped")[2]
    assert "Try: a lower verl_fp16.loss_scale.min than 256" in drill.log
    saved = drill.folder / "checkpoints" / "global_step_35" / "actor"
    state = json.loads((saved / "loss_scale_world_size_2_rank_1.json").read_text())
    assert (state["scale"], state["skipped_total"], state["consecutive_skips"]) == (256.0, 32, 10)
    assert len(list(saved.glob("model_world_size_2_rank_*.pt"))) == 2
