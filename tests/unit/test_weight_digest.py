"""Digests: what they see, what they must not see, and that chunks and order make no difference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_fp16.weight_sync import digest
from verl_fp16.weight_sync.digest import additive_digest, as_unsigned, stream_digest, total

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8)


def values(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(0, 200, (count,), generator=generator).to(dtype)


def reference(tensor: torch.Tensor) -> int:
    """The definition, element by element in Python's integers."""
    size = tensor.element_size()
    bits = [
        int.from_bytes(bytes(row), "little") for row in tensor.reshape(-1).view(torch.uint8).view(-1, size).tolist()
    ]
    size = digest._BLOCK
    base = [mixed(i + 1) | 1 for i in range(min(size, len(bits)))]
    factor = [1, *(mixed(block + size) | 1 for block in range(1, len(bits) // size + 1))]
    return sum(number * base[i % size] * factor[i // size] for i, number in enumerate(bits)) % 2**64


def mixed(number: int) -> int:
    """splitmix64's mixer of ``number`` steps, with the shifts that the digest has."""
    word = number * 0x9E3779B97F4A7C15 % 2**64 * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 29) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 32


@pytest.fixture
def small_blocks(monkeypatch):
    cached = digest._base, digest._factor
    monkeypatch.setattr(digest, "_BLOCK", 64)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", (1, 63, 64, 65, 1000))
def test_the_stream_digest_is_what_its_formula_says(dtype, count, small_blocks):
    tensor = values(count, dtype)
    assert as_unsigned(stream_digest(tensor)) == reference(tensor)


def test_what_has_the_same_sum_in_another_order_shows(small_blocks):
    """Rows of an identity have equal sums of bits, blocks of them too; a plain sum by position would not tell them."""
    eye = torch.eye(32, dtype=torch.float16)
    swapped = {"rows": eye[[1, 0, *range(2, 32)]], "blocks": torch.cat([eye[2:4], eye[:2], eye[4:]])}
    swapped["half"] = torch.cat([eye[16:], eye[:16]])
    assert len({as_unsigned(stream_digest(t)) for t in (eye, *swapped.values())}) == 4
    one, other = torch.tensor([1.0, 1.0]).half(), torch.tensor([1.0, 1.0]).half()
    other.view(torch.int16)[:] += torch.tensor([2, -1], dtype=torch.int16)
    assert as_unsigned(stream_digest(one)) != as_unsigned(stream_digest(other))
    pair = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert as_unsigned(stream_digest(pair)) != as_unsigned(stream_digest(pair * torch.tensor([1.0, -1.0])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_and_strides_make_no_difference(dtype, monkeypatch):
    tensor = values(6 * 35, dtype).view(6, 5, 7)
    transposed = tensor.transpose(0, 2)
    whole = [as_unsigned(d(t)) for d in (stream_digest, additive_digest) for t in (tensor, transposed)]
    monkeypatch.setattr(digest, "_CHUNK", 8)
    chunked = [as_unsigned(d(t)) for d in (stream_digest, additive_digest) for t in (tensor, transposed)]
    assert chunked == whole
    assert as_unsigned(stream_digest(transposed)) == as_unsigned(stream_digest(transposed.contiguous()))


@given(count=st.integers(1, 400), position=st.integers(0, 399), bit=st.integers(0, 15), seed=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_one_flipped_bit_shows_in_both(count, position, bit, seed):
    tensor = values(count, torch.float16, seed)
    flipped = tensor.clone()
    flipped.view(torch.int16)[position % count] ^= 1 << bit if bit < 15 else -(2**15)
    assert as_unsigned(stream_digest(tensor)) != as_unsigned(stream_digest(flipped))
    # The one change that means nothing to it: none. A zero that loses its sign shows too.
    assert as_unsigned(additive_digest(tensor)) != as_unsigned(additive_digest(flipped))


@given(seed=st.integers(0, 9), shuffle=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_another_order_shows_in_the_stream_digest_only(seed, shuffle):
    tensor = values(300, torch.float16, seed)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(shuffle))
    assert as_unsigned(stream_digest(tensor[order])) != as_unsigned(stream_digest(tensor))
    assert as_unsigned(additive_digest(tensor[order])) == as_unsigned(additive_digest(tensor))


def test_parts_add_up_and_padding_is_nothing():
    tensor = values(4000, torch.float16).view(40, 100)
    padded = torch.zeros(64, 128, dtype=torch.float16)
    padded[:40, :100] = tensor
    parts = [as_unsigned(additive_digest(part)) for part in tensor.split((7, 1, 32))]
    assert total(parts) == as_unsigned(additive_digest(tensor)) == as_unsigned(additive_digest(padded))


def test_empty_and_scalar():
    assert as_unsigned(stream_digest(torch.empty(0))) == as_unsigned(additive_digest(torch.empty(0, 3))) == 0
    one = torch.tensor(1.5)
    assert as_unsigned(stream_digest(one)) == reference(one)


def test_a_large_tensor_has_small_temporaries():
    """The largest thing that is allocated is some chunks of 8 bytes an element."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != given:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    tensor = values(3 * 2**20, torch.float16)
    given = tensor.untyped_storage().data_ptr()
    with Watch():
        for laid_out in (tensor, tensor.view(-1, 6).t(), tensor.view(6, -1).t()):
            stream_digest(laid_out)
            additive_digest(laid_out)
    assert 0 < largest <= 8 * digest._CHUNK, "int64 for a chunk"
