"""The gap of a training step's first mini-batch on one rank."""

from __future__ import annotations

import math

import torch

from verl_fp16.mismatch.first_mini_batch import FirstMiniBatch
from verl_fp16.mismatch.statistics import GapStatistics


def micro_batch(rows: int, gap: float) -> list[torch.Tensor]:
    rollout = torch.full((rows, 3), -1.0)
    return [rollout, rollout - gap, torch.ones(rows, 3), torch.arange(3 * rows).reshape(rows, 3)]


def test_only_the_first_mini_batch_of_a_step_is_measured():
    first, logged = FirstMiniBatch(), []
    for number in range(6):
        first.begin()
        if first.running:
            first.take(*micro_batch(2, 0.1 * (number + 1)))
        logged.append(first.end(last=number % 3 == 2))
    assert [round(found.get("k1", 0), 6) for found in logged] == [0.1, 0, 0, 0.4, 0, 0]


def test_micro_batches_are_merged_and_their_rows_stay_apart():
    first, whole = FirstMiniBatch(), GapStatistics()
    first.begin()
    for part in (micro_batch(2, 0.1), micro_batch(3, 0.2)):
        first.take(*part)
        whole.add(*part[:3])
    assert first.end(last=True) == whole.scalars()
    evidence, curves = first.evidence(100, 100)
    assert sorted(row.row for row in evidence.sequences) == [0, 1, 2, 3, 4]
    assert len({(token.row, token.position) for token in evidence.tokens}) == 15
    assert curves == whole.curves()


def test_what_is_not_finite_is_counted_in_all_mini_batches_once():
    first = FirstMiniBatch()
    bad = micro_batch(2, 0.1)
    bad[0][0, 0], bad[0][1, 2], bad[2][1, 2] = math.nan, -math.inf, 0
    first.begin()
    first.take(*bad)
    first.end(last=False)
    first.begin()
    first.count(bad[0], bad[2])
    assert first.end(last=True) == {}
    assert first.take_nonfinite() == 2, "the one that is masked does not count"
    assert first.take_nonfinite() == 0


def test_a_mini_batch_without_log_probabilities_has_no_gap():
    first = FirstMiniBatch()
    first.begin()
    assert first.end(last=True) == {} and first.take_nonfinite() == 0
