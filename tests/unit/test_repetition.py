"""Runs of one token: exact against a loop over tokens, whatever the mask, and cheap on a step's worth of tokens."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_fp16.mismatch import repetition
from verl_fp16.mismatch.repetition import find_runs, rows_with_runs

TOKENS_OF_A_STEP = (64, 16384)


def reference(tokens: torch.Tensor, mask: torch.Tensor, length: int) -> dict[int, int]:
    """Token by token."""
    found = {}
    for row, (line, kept) in enumerate(zip(tokens.tolist(), mask.tolist(), strict=True)):
        for (there, token), run in groupby(zip(kept, line, strict=True)):
            if there and len(list(run)) >= length:
                found.setdefault(row, token)
    return found


@st.composite
def responses(draw):
    """Few tokens, in runs whose lengths lie around what is looked for; the mask has holes and padding."""
    length = draw(st.integers(2, 9))
    positions = draw(st.integers(0, 40))
    run = st.tuples(st.integers(0, 2), st.integers(1, length + 2), st.booleans())
    lines = []
    for runs in draw(st.lists(st.lists(run, max_size=12), max_size=5)):
        line = [(token, kept) for token, count, kept in runs for _ in range(count)]
        lines.append((line + [(0, False)] * positions)[:positions])
    shape = len(lines), positions
    tokens = torch.tensor([[token for token, _ in line] for line in lines], dtype=torch.int64).reshape(shape)
    mask = torch.tensor([[kept for _, kept in line] for line in lines], dtype=torch.bool).reshape(shape)
    return tokens, mask, length


@settings(max_examples=400, deadline=None)
@given(responses())
def test_it_is_what_a_loop_over_tokens_finds(case):
    tokens, mask, length = case
    expected = reference(tokens, mask, length)
    assert find_runs(tokens, mask, length) == expected
    assert list(find_runs(tokens, mask.to(torch.int64), length)) == sorted(expected)
    assert rows_with_runs(tokens, mask, length) == len(expected)


@pytest.mark.parametrize("length", (2, 3, 5, 8, 64))
def test_a_run_is_found_wherever_it_begins_and_only_from_its_length_on(length):
    positions = 3 * length + 1
    places = [start for start in range(positions - length + 1)]
    tokens = torch.arange(positions).repeat(len(places), 1) + 7
    for row, start in enumerate(places):
        tokens[row, start : start + length] = 0
    mask = torch.ones_like(tokens)
    assert find_runs(tokens, mask, length) == dict.fromkeys(range(len(places)), 0)
    assert find_runs(tokens, mask, length + 1) == {}
    for row, start in enumerate(places):
        mask[row, start + length // 2] = 0
    assert find_runs(tokens, mask, length) == {}, "a hole in the mask ends a run"


def test_it_is_the_same_in_parts(monkeypatch):
    tokens = torch.randint(0, 2, (50, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(50, 60, generator=torch.Generator().manual_seed(1)) < 0.9
    whole = find_runs(tokens, mask, 6)
    assert whole == reference(tokens, mask, 6) and 0 < len(whole) < 50
    monkeypatch.setattr(repetition, "_CHUNK", 7)
    assert find_runs(tokens, mask, 6) == whole


def test_wrong_shapes_and_lengths_are_refused():
    with pytest.raises(ValueError, match=r"one shape \(rows, positions\), got \(2, 3\), \(2, 4\)"):
        find_runs(torch.zeros(2, 3), torch.zeros(2, 4), 2)
    with pytest.raises(ValueError, match="one shape"):
        find_runs(torch.zeros(3), torch.zeros(3), 2)
    with pytest.raises(ValueError, match="at least 2 positions, got length=1"):
        find_runs(torch.zeros(2, 3), torch.ones(2, 3), 1)


@pytest.fixture
def looked_at(monkeypatch):
    """Numbers of elements that were looked at one by one."""
    numbers = []
    cummax = torch.Tensor.cummax

    def counted(tensor, dim):
        numbers.append(tensor.numel())
        return cummax(tensor, dim)

    monkeypatch.setattr(torch.Tensor, "cummax", counted)
    return numbers


def test_rows_without_a_run_are_hardly_read(looked_at):
    """Of text in which one token in twenty is the same, most rows have equal samples; padding is all the same."""
    tokens = torch.randint(1, 20, TOKENS_OF_A_STEP, generator=torch.Generator().manual_seed(0))
    tokens[:, 10000:] = 0
    assert find_runs(tokens, tokens != 0, 64) == {}
    assert looked_at == []


def test_a_stuck_row_is_read_once(looked_at):
    tokens = torch.zeros(4, 1000, dtype=torch.int64)
    assert rows_with_runs(tokens, torch.ones_like(tokens), 64) == 4
    assert looked_at == [4 * 999]
