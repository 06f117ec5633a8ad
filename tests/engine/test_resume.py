"""The loss scale in verl's checkpoints: resumed to the bit, the same on all ranks, and in plain verl's too."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import PARAMETER, STRATEGIES, make_engine, run_calls, same, state_of, train
from ranks import on_ranks


@pytest.fixture(scope="module")
def two_ranks(tiny_model, tmp_path_factory) -> list[dict]:
    model, folder, calls = str(tiny_model), tmp_path_factory.mktemp("saved"), {}
    for strategy in STRATEGIES:
        calls[f"resume {strategy}"] = ("killed_and_resumed", model, strategy, str(folder / strategy))
    calls["different states"] = ("different_states", model, str(folder / "fsdp2"))
    return on_ranks(2, run_calls, __name__, calls, folder=tmp_path_factory.mktemp("two-ranks"))


def killed_and_resumed(model: str, strategy: str, folder: str) -> dict:
    """Eight updates with faults; and four of them, a checkpoint, and four more in a new engine."""
    faults = [{"target": "gradient", "parameter": PARAMETER, "rank": 1, "updates": [2, 3, 5]}]
    settings = {"growth_interval": 1}
    cosine = {"lr_scheduler_type": "cosine", "total_training_steps": 10}

    def engine():
        return make_engine(model, strategy, faults=faults, scale=settings, optimizer=cosine)

    def steps(engine, count: int) -> list:
        told = []
        for _ in range(count):
            metrics = train(engine)
            counts = [metrics[name] for name in ("loss_scale", "skipped_total", "skipped_steps", "applied_steps")]
            told.append((*counts, engine.lr_scheduler_step()))
        return told

    whole = engine()
    told = steps(whole, 8)
    first = engine()
    steps(first, 4)
    first.save_checkpoint(folder, global_step=4)
    resumed = engine()
    resumed.load_checkpoint(folder)
    again = steps(resumed, 4)
    files = sorted(path.name for path in Path(folder).glob("loss_scale*"))
    return {"same": same(state_of(whole), state_of(resumed)), "told": told, "again": again, "files": files}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_and_resumed_is_bit_identical_to_uninterrupted(two_ranks, strategy):
    for rank in two_ranks:
        seen = rank[f"resume {strategy}"]
        assert seen["same"]
        assert seen["again"] == seen["told"][4:]
        assert seen["files"] == ["loss_scale_world_size_2_rank_0.json", "loss_scale_world_size_2_rank_1.json"]
        assert [scale for (scale,), *_ in seen["told"]] == [2.0**power for power in (17, 16, 15, 16, 15, 16, 17, 18)]
        assert [applied for *_, (applied,), _ in seen["again"]] == [0, 1, 1, 1]
        assert seen["again"][0][-1] == seen["told"][3][-1], "the first update after the resume is skipped, and held"


def different_states(model: str, folder: str) -> str:
    import torch.distributed as dist

    from verl_fp16.loss_scaling import LossScaleStateError
    from verl_fp16.scaler_checkpoint import load_scaler, state_file

    engine = make_engine(model, "fsdp2")
    told = []
    for damage in ('{"format": 1, "scale": 2.0}', "{", None):
        file = state_file(folder, dist.get_rank(), 2)
        kept = file.read_text()
        if dist.get_rank() == 1:
            file.write_text(damage) if damage else file.unlink()
        dist.barrier()
        try:
            load_scaler(engine.scaler, folder)
        except LossScaleStateError as error:
            told.append(str(error))
        dist.barrier()
        file.write_text(kept)
    return told


def test_ranks_that_find_different_states_all_stop_and_say_which(two_ranks):
    for rank in two_ranks:
        different, unreadable, missing = rank["different states"]
        assert "different loss-scale states" in different and "rank 0: " in different and "rank 1: " in different
        assert "rank_1.json cannot be read" in unreadable
        assert "rank 1: None" in missing


def to_and_from_plain_verl(model: str, folder: str) -> dict:
    """A checkpoint of ours in a plain engine and the other way round."""
    import contextlib
    import io

    from verl_fp16 import standalone

    def plain():
        precision = standalone.mixed_precision("float32")
        del precision["verl_fp16"]
        return standalone.build_engine(model, precision=precision)

    ours = make_engine(model, "fsdp2")
    train(ours)
    ours.save_checkpoint(f"{folder}/ours")
    stock = plain()
    stock.load_checkpoint(f"{folder}/ours")
    taken = same(state_of(ours), state_of(stock))
    stock.save_checkpoint(f"{folder}/plain")
    said = io.StringIO()
    resumed = make_engine(model, "fsdp2", scale={"init": 128.0})
    with contextlib.redirect_stderr(said):
        resumed.load_checkpoint(f"{folder}/plain")
    files = [path.name for path in Path(f"{folder}/plain").glob("loss_scale*")]
    return {"taken": taken, "back": same(state_of(stock), state_of(resumed)), "said": said.getvalue(), "files": files}


def test_checkpoints_go_to_plain_verl_and_come_back_with_a_notice(tiny_model, tmp_path):
    arguments = (str(tiny_model), str(tmp_path / "saved"))
    (seen,) = on_ranks(1, to_and_from_plain_verl, *arguments, folder=tmp_path)
    assert seen["taken"] and seen["back"] and seen["files"] == []
    assert "as plain verl saves none: it goes on from 128" in seen["said"]
