"""Memory goes to the next tensor when the last view of the one before is gone, and not earlier."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch

from verl_fp16.recycled_memory import RecycledMemory
from verl_fp16.weight_cast import CheckedCast


def test_a_tensor_takes_the_place_of_one_that_is_gone():
    memory = RecycledMemory()
    first = memory.empty((64, 32), torch.float16)
    where = first.data_ptr()
    del first
    assert memory.empty((2048,), torch.float16).data_ptr() == where
    assert memory.empty((512,), torch.float32).data_ptr() == where, "half of it is enough"


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


def test_what_is_kept_is_bounded():
    memory = RecycledMemory()
    held = [memory.empty((1000 * size,), torch.float16) for size in (1, 8, 8, 1, 8, 8, 8)]
    del held
    assert sorted(len(block) for block in memory._free) == [16000] * 4


def test_layer_after_layer_needs_no_new_memory():
    """A consumer holds one image while it asks for the next."""
    memory, layer = RecycledMemory(), (1000, 500, 500, 1000, 4000, 4000, 4000, 10)
    held, places = None, []
    for index in range(10):
        for size in layer:
            image = memory.empty((size,), torch.float16)
            if index > 1:
                places.append(image.data_ptr())
            held = image
    assert held is not None and len(set(places)) <= 6


def test_a_small_tensor_takes_no_large_block():
    memory = RecycledMemory()
    large = memory.empty((8000,), torch.float16)
    where = large.data_ptr()
    del large
    small = memory.empty((3999,), torch.float16)
    assert small.data_ptr() != where and small.untyped_storage().nbytes() == 2 * 3999
    again = memory.empty((4000,), torch.float16)
    assert again.data_ptr() == where and again.untyped_storage().nbytes() == 2 * 4000


def test_a_default_device_makes_no_difference():
    with torch.device("meta"):
        assert RecycledMemory().empty((2, 3), torch.float16).device.type == "cpu"
        assert RecycledMemory().empty((0, 3), torch.float16).device.type == "cpu"
        source = torch.ones(3000, device="cpu")
        assert CheckedCast()("w", source).device.type == "cpu"


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
