"""The worst tokens and the sequences' log-ratios against plain loops, whole and in parts, and their bounds."""

from __future__ import annotations

import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from verl_fp16.mismatch import evidence
from verl_fp16.mismatch.evidence import Evidence, SequenceRatio, WorstToken, collect, collect_packed
from verl_fp16.mismatch.statistics import GapStatistics, Rows

ODD = (math.inf, -math.inf, math.nan, -1e4, 1e300, -1e300)


def batch(seed: int, rows: int, columns: int, scale: float, bad: float, holes: float, dtype: torch.dtype):
    """log mu, log pi, mask and tokens; a share ``bad`` of either side is odd, ``holes`` of the responses not masked."""
    numbers = np.random.default_rng(seed)
    mu = -numbers.exponential(1.0, (rows, columns)).round(1)
    pi = mu + (numbers.standard_normal((rows, columns)) * scale).round(1)
    mask = np.arange(columns)[None] < numbers.integers(0, columns + 1, rows)[:, None]
    mask &= numbers.random((rows, columns)) >= holes
    for side in (mu, pi):
        where = numbers.random((rows, columns)) < bad
        side[where] = numbers.choice(ODD, (rows, columns))[where]
    tokens = torch.from_numpy(numbers.integers(0, 150_000, (rows, columns)))
    return torch.tensor(mu).to(dtype), torch.tensor(pi).to(dtype), torch.tensor(mask), tokens


batches = st.builds(
    batch,
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 9),
    columns=st.integers(0, 40),
    scale=st.sampled_from([0.0, 0.1, 5.0]),
    bad=st.sampled_from([0.0, 0.05, 0.6]),
    holes=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)


def counts(mu: float, pi: float) -> bool:
    return all(math.isfinite(value) and abs(value) <= 1e100 for value in (mu, pi, mu - pi))


def by_hand(mu, pi, mask, tokens, max_tokens: int, ids=None, rank: int = 0, first_row: int = 0):
    """The worst tokens and all sequences, by loops over Python numbers."""
    worst, sequences = [], []
    for row in range(len(mu)):
        places = [column for column in range(mu.shape[1]) if mask[row, column]]
        here = [int(tokens[row, column]) for column in places]
        pairs = [(float(mu[row, column]), float(pi[row, column])) for column in places]
        length = sum(counts(*pair) for pair in pairs)
        name = ids[row] if ids else None
        for index, (column, pair) in enumerate(zip(places, pairs, strict=True)):
            context = here[max(0, index - 16) : index], here[index + 1 : index + 9]
            worst.append(WorstToken(rank, first_row + row, name, column, length, here[index], *context, *pair))
        if length:
            s = math.fsum(pi - mu for mu, pi in pairs if counts(mu, pi))
            sequences.append(SequenceRatio(rank, first_row + row, name, length, s))

    def order(token: WorstToken):
        gap = abs(token.log_mu - token.log_pi) if counts(token.log_mu, token.log_pi) else math.inf
        return -gap, token.rank, token.row, token.position

    return sorted(worst, key=order)[:max_tokens], sequences


def plain(values) -> list[str]:
    """Comparable with nan."""
    return [repr(value) for value in values]


def same_sequences(found: list[SequenceRatio], expected: list[SequenceRatio]) -> None:
    assert [sequence[:-1] for sequence in found] == [sequence[:-1] for sequence in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_ratio == pytest.approx(other.log_ratio, rel=1e-9, abs=1e-9)


def collected(mu, pi, mask, tokens, **more) -> Evidence:
    more = {"max_tokens": 5, "max_sequences": 4, **more}
    return collect(mu, pi, mask, tokens, GapStatistics().add(mu, pi, mask), **more)


def packed(mu, pi, mask, tokens, **more) -> Evidence:
    """The same batch without the columns behind each row's last token of the mask."""
    numbers = torch.arange(1, mask.shape[1] + 1)
    lengths = [int((row * numbers).max()) if len(numbers) else 0 for row in mask]
    flat = [
        torch.cat([row[:length] for row, length in zip(side, lengths, strict=True)] or [side.flatten()])
        for side in (mu, pi, mask, tokens)
    ]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rows = GapStatistics().add_packed(*flat[:3], offsets)
    return collect_packed(*flat, offsets, rows, **{"max_tokens": 5, "max_sequences": 4, **more})


@settings(max_examples=300, deadline=None)
@given(batches, st.sampled_from([0, 1, 3, 20, 500]), st.sampled_from([1, 7, 64, 2**17]), st.booleans())
def test_against_plain_loops(batch, most, chunk, named):
    ids = [f"sample-{row}" for row in range(len(batch[0]))] if named else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "_CHUNK", chunk)
        options = {"max_tokens": most, "max_sequences": 100, "ids": ids, "rank": 3, "first_row": 40}
        found = collected(*batch, **options)
        without_padding = packed(*batch, **options)
    worst, sequences = by_hand(*batch, most, ids, rank=3, first_row=40)
    assert plain(found.tokens) == plain(worst)
    same_sequences(found.sequences, sequences)
    assert found.sequences_seen == len(sequences)
    assert found.tokens_seen == sum(sequence.length for sequence in sequences)
    assert plain(without_padding.tokens) == plain(worst)
    same_sequences(without_padding.sequences, sequences)
    assert [token.gap == math.inf for token in worst] == [not counts(token.log_mu, token.log_pi) for token in worst]


@settings(max_examples=200, deadline=None)
@given(
    batches,
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=4),
    st.integers(0, 30),
    st.integers(0, 8),
    st.randoms(use_true_random=False),
)
def test_parts_merged_in_any_order_are_the_whole(batch, cuts, max_tokens, max_sequences, order):
    """Rows go to ranks in blocks; each part numbers its rows on from what its rank has had."""
    bounds = {"max_tokens": max_tokens, "max_sequences": max_sequences}
    edges = sorted({0, len(batch[0]), *(min(cut, len(batch[0])) for cut, _ in cuts)})
    ranks = [rank for _, rank in cuts] + [0] * len(edges)
    had = dict.fromkeys(range(3), 0)
    parts, whole = [], {rank: [] for rank in range(3)}
    for (start, stop), rank in zip(zip(edges, edges[1:], strict=False), ranks, strict=False):
        rows = [side[start:stop] for side in batch]
        parts.append(collected(*rows, rank=rank, first_row=had[rank], **bounds))
        whole[rank].append(rows)
        had[rank] += stop - start
    together = [
        collected(*(torch.cat(sides) for sides in zip(*rows, strict=True)), rank=rank, **bounds)
        for rank, rows in whole.items()
        if rows
    ]
    empty = Evidence(max_tokens, max_sequences, [], [], 0, 0)
    expected = empty.merge(together)
    order.shuffle(parts)
    one_by_one = empty
    for part in parts:
        one_by_one = part.merge([one_by_one])
    for found in (empty.merge(parts), one_by_one):
        assert plain(found.tokens) == plain(expected.tokens)
        same_sequences(found.sequences, expected.sequences)
        assert (found.tokens_seen, found.sequences_seen) == (expected.tokens_seen, expected.sequences_seen)
        assert len(found.tokens) <= max_tokens and len(found.sequences) <= max_sequences
    tokens, sequences = [], []
    for rank, rows in whole.items():
        if rows:
            more = by_hand(*(torch.cat(sides) for sides in zip(*rows, strict=True)), 10_000, rank=rank)
            tokens, sequences = tokens + more[0], sequences + more[1]
    worst = sorted(tokens, key=lambda token: (-token.gap, token.rank, token.row, token.position))
    assert plain(expected.tokens) == plain(worst[:max_tokens])
    assert set(plain(s[:3] for s in expected.sequences)) <= set(plain(s[:3] for s in sequences))
    assert len(expected.sequences) == min(max_sequences, len(sequences))


def test_the_log_ratio_of_a_token_has_the_sign_of_its_sequences():
    found = collected(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), torch.ones(1, 1), torch.ones(1, 1))
    assert found.tokens[0].log_ratio == found.sequences[0].log_ratio == -2.0
    assert found.tokens[0].gap == 2.0


def test_ties_go_to_the_first_in_the_batch():
    mu = torch.zeros(40, 50)
    pi = torch.full_like(mu, -0.5)
    pi[7, 3], pi[8, 2] = math.nan, -math.inf
    mask = torch.ones_like(mu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "_CHUNK", 100)
        found = collected(mu, pi, mask, mask.long(), max_tokens=60)
    places = [(token.row, token.position) for token in found.tokens]
    assert places[:2] == [(7, 3), (8, 2)]
    assert places[2:] == [(index // 50, index % 50) for index in range(58)]


@pytest.mark.parametrize("rows", (5, 64, 100, 1000, 4097))
def test_the_sequences_kept_are_spread_over_the_batch(rows):
    mu = torch.zeros(rows, 1)
    found = collected(mu, mu, mu + 1, mu.long(), max_sequences=64)
    kept = np.array([sequence.row for sequence in found.sequences])
    assert len(kept) == min(rows, 64)
    assert found.sequences_seen == rows
    gaps = np.diff([*kept, rows])
    assert gaps.max() <= 2 * math.ceil(rows / 64) and kept[0] == 0
    assert list(kept) == sorted(set(kept))


def test_rows_without_a_token_that_counts_are_no_sequences():
    mu = torch.zeros(100, 2)
    mask = (torch.arange(100) % 2 == 1).long()[:, None].repeat(1, 2)
    found = collected(mu, mu, mask, mu.long(), max_sequences=50)
    assert [sequence.row for sequence in found.sequences] == list(range(1, 100, 2))


def test_the_smallest_bounds_hold_in_a_merge():
    mu = torch.zeros(10, 3)
    parts = [
        collected(mu, mu, mu + 1, mu.long(), first_row=10 * index, max_tokens=most, max_sequences=most + 1)
        for index, most in enumerate((9, 4, 6))
    ]
    found = parts[0].merge(parts[1:])
    assert (found.max_tokens, found.max_sequences) == (4, 5) == (len(found.tokens), len(found.sequences))


def test_evidence_is_plain_and_survives_pickling():
    found = collected(*batch(1, 5, 30, 0.1, 0.1, 0.1, torch.float32), ids=list("abcde"))
    assert repr(pickle.loads(pickle.dumps(found))) == repr(found)
    allowed = (int, float, str, list, type(None))
    for row in (*found.tokens, *found.sequences):
        assert [type(value) for value in row if type(value) not in allowed] == []


def test_tensors_that_need_gradients_and_views_are_taken_as_they_are():
    mu, pi, mask, tokens = batch(2, 6, 40, 0.1, 0.0, 0.2, torch.float32)
    expected = collected(mu, pi, mask, tokens)
    wide = torch.stack([pi, pi], dim=2).requires_grad_()
    assert repr(collected(mu.t().contiguous().t(), wide[:, :, 0], mask.int(), tokens)) == repr(expected)


class LargestOutput(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else (result,)
        inputs = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        for output in outputs:
            if isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, output.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("gaps", ("growing", "equal", "nan"))
@pytest.mark.parametrize("form", (collected, packed))
def test_temporaries_do_not_grow_with_the_batch(form, gaps):
    mu = torch.rand(100, 4000, generator=torch.Generator().manual_seed(0))
    pi = {
        "growing": mu * torch.linspace(1, 2, 100)[:, None],  # every chunk has worse ones than the last
        "equal": mu,
        "nan": torch.full_like(mu, math.nan),
    }[gaps]
    inputs = mu, pi, torch.ones_like(mu), mu.long()
    rows = GapStatistics().add(*inputs[:3])
    offsets = torch.arange(101) * 4000
    with LargestOutput() as watch:
        if form is packed:
            collect_packed(*(x.flatten() for x in inputs), offsets, rows, max_tokens=64, max_sequences=64)
        else:
            collect(*inputs, rows, max_tokens=64, max_sequences=64)
    assert watch.largest <= 2**17 * 8 + 4000 * 8


@pytest.mark.parametrize(
    ("change", "told"),
    (
        ({"mask": torch.ones(2, 4)}, r"must be of one shape .*\(2, 4\)"),
        ({"tokens": torch.ones(3)}, "must be of one shape"),
        ({"rows": Rows(torch.zeros(3), torch.zeros(3))}, "there are 2 sequences, and rows of 3"),
        ({"ids": ["a"]}, "there are 2 sequences, and rows of 2 and 1 ids"),
        ({"max_tokens": -1}, "must not be negative, got -1 and 4"),
        ({"max_sequences": -1}, "must not be negative, got 4 and -1"),
    ),
)
def test_what_is_refused(change, told):
    sides = {name: torch.zeros(2, 3) for name in ("rollout", "training", "mask", "tokens")}
    given = {**sides, "rows": Rows(torch.zeros(2), torch.zeros(2)), "max_tokens": 4, "max_sequences": 4, **change}
    with pytest.raises(ValueError, match=told):
        collect(**given)


@pytest.mark.parametrize("offsets", ([0, 2], [1, 3], []))
def test_offsets_that_do_not_fit(offsets):
    sides = [torch.zeros(3)] * 4
    rows = Rows(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="offsets must begin with 0 and end with 3"):
        collect_packed(*sides, torch.tensor(offsets).long(), rows, max_tokens=1, max_sequences=1)


def test_the_padded_and_the_packed_form_refuse_each_others_shapes():
    rows = Rows(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="sequences, positions"):
        collect(*[torch.zeros(3)] * 4, rows, max_tokens=1, max_sequences=1)
    with pytest.raises(ValueError, match=r"\(tokens,\)"):
        collect_packed(*[torch.zeros(3, 1)] * 4, torch.tensor([0, 3]), rows, max_tokens=1, max_sequences=1)


def test_random_ids_do_not_decide_the_order():
    mu = torch.zeros(9, 4)
    names = random.Random(3).sample([f"{number}" for number in range(100)], 9)
    found = collected(mu, mu, mu + 1, mu.long(), ids=names)
    assert [(token.row, token.position) for token in found.tokens] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
