"""Memory goes to the next tensor when the last view of the one before is gone, and not earlier."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch

from verl_fp16.recycled_memory import RecycledMemory


def test_a_tensor_takes_the_place_of_one_that_is_gone():
    memory = RecycledMemory()
    first = memory.empty((64, 32), torch.float16)
    where = first.data_ptr()
    del first
    assert memory.empty((2048,), torch.float16).data_ptr() == where
    assert memory.empty((512,), torch.float32).data_ptr() == where


@pytest.mark.parametrize(
    "hold",
    (
        lambda t: t,
        lambda t: t[3:4],
        lambda t: t.detach(),
        lambda t: t.view(torch.int16).t(),
        lambda t: t.untyped_storage(),
        lambda t: t.numpy(),
        lambda t: torch.nn.Parameter(t),
        lambda t: {"of": [t.unsqueeze(0)]},
    ),
)
def test_whatever_shares_the_memory_keeps_it(hold):
    memory = RecycledMemory()
    tensor = memory.empty((64, 32), torch.float16).fill_(3)
    where, held = tensor.data_ptr(), hold(tensor)
    del tensor
    gc.collect()
    other = memory.empty((64, 32), torch.float16).fill_(5)
    assert other.data_ptr() != where
    del held
    gc.collect()
    assert memory.empty((64, 32), torch.float16).data_ptr() == where


def test_what_is_kept_is_bounded_by_what_was_in_use_at_once():
    memory = RecycledMemory()
    previous = None
    for size in (10, 1000, 10, 500, 4000, 3, 4000, 2000, 8000, 8000):
        image = memory.empty((size,), torch.float16)
        previous = image  # as a consumer does, which holds one while it asks for the next
    del image, previous
    assert sorted(len(block) for block in memory._free) == [16000, 16000]


def test_tensors_look_like_torchs_own():
    memory = RecycledMemory()
    tensor = memory.empty((3, 5), torch.float16)
    assert tensor.shape == (3, 5) and tensor.is_contiguous() and tensor.dtype == torch.float16
    assert tensor.data_ptr() % 64 == 0 and not tensor.requires_grad and tensor.untyped_storage().nbytes() == 30
    tensor.copy_(torch.arange(15.0).view(3, 5))
    assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)
    assert memory.empty((0, 5), torch.float16).shape == (0, 5) and memory.empty((), torch.float16).shape == ()


def test_a_tensor_outlives_the_memory():
    tensor = RecycledMemory().empty((1000,), torch.float16).fill_(7)
    gc.collect()
    torch.empty(1000, dtype=torch.float16).fill_(1)
    assert (tensor == 7).all()
