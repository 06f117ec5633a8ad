"""On a step without a skip the scaler adds no operation and no read from the device to what verl's own does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ranks import on_ranks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def counts_of_both_sides(model: str, planted: bool) -> dict:
    sys.path.insert(0, str(BENCHMARKS))
    import scaler_cost

    engine, sides = scaler_cost.make_sides(Path(model), "cpu")
    if planted:
        watch = engine._verl_fp16_watch
        after_unscaling = watch.after_unscaling

        def with_a_read_too_many():
            after_unscaling()
            next(engine.module.parameters()).to_local().isfinite().all().item()

        watch.after_unscaling = with_a_read_too_many
    return scaler_cost.count_operations(engine, sides)


@pytest.fixture(scope="module")
def counted(tiny_model, tmp_path_factory) -> dict:
    return {
        planted: on_ranks(
            2, counts_of_both_sides, str(tiny_model), planted, folder=tmp_path_factory.mktemp(f"cost-{planted}")
        )
        for planted in (False, True)
    }


def test_no_operation_and_no_read_is_added(counted):
    for rank in counted[False]:
        native, ours = rank["ShardedGradScaler"], rank["LossScaler"]
        assert ours["reads"] == native["reads"], rank
        # torch's: four copies and a reciprocal for the inverse scale, and the scale's update; ours: the check of the
        # log-probabilities.
        assert ours["operations"] == native["operations"] - 5, rank
        assert ours["reads_profiled"] == native["reads_profiled"] > 10, rank
        assert native["operations"] > 1000 and native["reads"] > 10, "the update was counted, not only the scaler"


def test_a_read_too_many_is_counted(counted):
    """The count sees what it is for."""
    for quiet, planted in zip(counted[False], counted[True], strict=True):
        assert planted["LossScaler"]["reads"] == quiet["LossScaler"]["reads"] + 1
        assert planted["LossScaler"]["operations"] > quiet["LossScaler"]["operations"]
        assert planted["ShardedGradScaler"] == quiet["ShardedGradScaler"]
