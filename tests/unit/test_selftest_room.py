"""What of the self-test a user's model has room for, by its size."""

from __future__ import annotations

import pytest

from verl_fp16.selftest.room import GIB, Room, room

BILLION = 10**9


@pytest.mark.parametrize(
    ("billions", "heads", "gpus", "gib", "parallel"),
    (
        (1.5, 12, 1, 80, 1),
        (7.6, 28, 8, 80, 1),
        (14.8, 40, 8, 80, 2),
        (32.8, 64, 8, 140, 2),
        (32.8, None, 16, 80, 4),
        # Of eight GPUs, two and four do not divide 7 heads.
        (7.6, 7, 8, 80, 1),
    ),
)
def test_a_rollout_has_the_fewest_gpus_that_hold_it(billions, heads, gpus, gib, parallel):
    found = room(int(billions * BILLION), heads, gpus, gib * GIB)
    assert (found.tensor_parallel, found.run) == (parallel, "")
    if parallel > 1:
        assert 2 * billions * BILLION / parallel <= 0.28 * gib * GIB < 2 * billions * BILLION / (parallel / 2)


def test_what_does_not_fit_is_said_with_the_sizes():
    found = room(int(7.6 * BILLION), 28, 1, 80 * GIB)
    assert found.gap == "" and found.run.startswith("its FP32 master weights, gradients and AdamW's state are 113 GiB")
    assert "on each of 1 GPU of 80 GiB: give more with --gpus" in found.run
    found = room(int(32.8 * BILLION), 64, 16, 80 * GIB)
    assert found.run == "" and "one of 80 GiB does not hold its FP32 weights with a forward, 128 GiB" in found.gap
    assert "divides its 7 heads" in room(int(20 * BILLION), 7, 8, 80 * GIB).run


def test_the_limits_are_where_the_memory_ends():
    most = int(0.7 * 80 * GIB / 16)
    assert room(most, None, 1, 80 * GIB) == Room()
    assert room(most + 2**20, None, 1, 80 * GIB).run
    most = int((0.9 * 24 - 6) * GIB / 4)
    assert not room(most, None, 8, 24 * GIB).gap and room(most + 2**20, None, 8, 24 * GIB).gap
