"""The checked cast against numpy's cast and counts in float64, its policies, messages and memory."""

from __future__ import annotations

import math
import random
from functools import reduce
from operator import add
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from verl_fp16 import cast_tally
from verl_fp16.weight_cast import OVERFLOW_POLICIES, CastCounts, CheckedCast, WeightOverflow, overflow_message

HALF_OF_SMALLEST = 2.0**-25
BOUNDARIES = [
    *(65504.0, 65519.996, 65520.0, 65536.0, 1e6, 3.3e38, 3.4e38, 2.0**-14, 2.0**-14 * (1 - 2.0**-12), 2.0**-24),
    *(HALF_OF_SMALLEST, float(np.nextafter(np.float32(HALF_OF_SMALLEST), np.float32(1))), 2.0**-26, 1e-40, 1e-300),
    *(float(np.nextafter(np.float32(HALF_OF_SMALLEST), np.float32(0))), 3 * HALF_OF_SMALLEST, 5 * HALF_OF_SMALLEST),
    # Halfway between neighbours, to either side, and a hair beside it: below float32's own precision, too.
    *(1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-11 - 2.0**-40, 2049.0, 2051.0),
    *(0.0, -0.0, 1.0, math.inf, math.nan),
]
SOURCES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
numbers = st.one_of(
    st.sampled_from(BOUNDARIES + [-value for value in BOUNDARIES]),
    st.floats(-0.1, 0.1),
    st.floats(width=32),
    st.floats(),
)


def reference(tensor: torch.Tensor, clamp: bool = False) -> tuple[np.ndarray, CastCounts]:
    """numpy's float16 image, flat, and the counts, written for reading."""
    exact = tensor.detach().double().numpy().ravel()
    with np.errstate(all="ignore"):
        image = exact.astype(np.float16)
    finite, magnitudes = np.isfinite(exact), np.abs(image.astype(np.float64))
    overflow = finite & np.isinf(image)
    counts = CastCounts(
        values=exact.size,
        overflow=int(overflow.sum()),
        flushed=int(((exact != 0) & (image == 0)).sum()),
        subnormal=int(((magnitudes > 0) & (magnitudes < 2.0**-14)).sum()),
        non_finite=int((~finite).sum()),
        max_abs=float(np.abs(exact[finite]).max(initial=0.0)),
    )
    if clamp:
        image = np.where(overflow, np.copysign(np.float16(65504), image), image)
    return image, counts


def same_bits(image: torch.Tensor, expected: np.ndarray) -> bool:
    got, nan = image.detach().contiguous().numpy().ravel(), np.isnan(expected)
    return bool((got.view(np.int16)[~nan] == expected.view(np.int16)[~nan]).all() and np.isnan(got[nan]).all())


def as_on_a_device(source: torch.Tensor, dtype: torch.dtype, clamp: bool) -> tuple[torch.Tensor, CastCounts]:
    """The path of a GPU, on the CPU: in small chunks, and with an error where it reads a number."""
    image = source if source.dtype == dtype else cast_tally.empty_image(source, dtype)
    with mock.patch.object(cast_tally, "DEVICE_CHUNK", 1000), NoReads():
        found = cast_tally.tally_on_device(source, image, clamp)
    return image, cast_tally.counts_from(found.tolist(), source.dtype)


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # What makes a GPU's host wait: reading a number, and results whose size is a number on the device.
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal"), name
        if name in ("index", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype is not torch.bool for index in indices), "a mask as an index is read"
        return function(*args, **(kwargs or {}))


@settings(max_examples=400, deadline=None)
@given(
    values=st.lists(numbers, max_size=60),
    dtype=st.sampled_from(SOURCES),
    policy=st.sampled_from(OVERFLOW_POLICIES),
    filler=st.sampled_from([0, 1100, 3000]),
    seed=st.integers(0, 2**16),
)
def test_image_and_counts_are_those_of_numpy_on_either_path(values, dtype, policy, filler, seed):
    """With ``filler`` ordinary weights around them, so that the values lie in rows as well as in a remainder."""
    generator = torch.Generator().manual_seed(seed)
    around = torch.randn(filler, generator=generator, dtype=torch.float64) * 0.02
    both = torch.cat([torch.tensor(values, dtype=torch.float64), around])
    tensor = both[torch.randperm(len(both), generator=generator)].to(dtype)
    before = tensor.clone()
    expected, counts = reference(tensor, clamp=policy == "clamp" and dtype != torch.float16)
    cast = CheckedCast(on_overflow=policy)
    image = cast("w", tensor)
    assert image.dtype == torch.float16 and image.shape == tensor.shape
    assert same_bits(image, expected)
    assert cast.counts() == {"w": counts}
    elsewhere, there = as_on_a_device(tensor, torch.float16, policy == "clamp")
    assert same_bits(elsewhere, expected)
    assert there == counts
    assert torch.equal(tensor.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("source", (torch.float32, torch.float64))
@pytest.mark.parametrize("target", (torch.bfloat16, torch.float32))
def test_other_targets(source, target):
    tensor = torch.tensor([3.39e38, 3.4e38, -3.4e38, 1e39, 1e-40, 1e-45, 1e-60, 0.0, 1 + 2.0**-8, 1.0], dtype=source)
    cast = CheckedCast(target, on_overflow="ignore")
    image = cast("w", tensor)
    wanted = tensor.float().to(target)
    finite, magnitudes = tensor.isfinite(), wanted.double().abs()
    assert torch.equal(image, wanted)
    assert cast.total() == CastCounts(
        values=10,
        overflow=int((finite & ~wanted.isfinite()).sum()),
        flushed=int(((tensor != 0) & (wanted == 0)).sum()),
        subnormal=int(((magnitudes > 0) & (magnitudes < 2.0**-126)).sum()),
        non_finite=int((~finite).sum()),
        max_abs=float(tensor.double()[finite].abs().max()),
    )
    assert as_on_a_device(tensor, target, False)[1] == cast.total()
    assert (image is tensor) == (source == target)


def test_float64_is_rounded_once():
    """By way of float32 this becomes a tie, which goes to the even neighbour: 1."""
    tensor = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    assert tensor.to(torch.float16).item() == 1.0
    assert CheckedCast()("w", tensor).item() == 1 + 2.0**-10
    assert CheckedCast(torch.bfloat16)("w", torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)) == 1 + 2.0**-7


SHAPES = {
    "scalar": lambda x: x[5],
    "none": lambda x: x[:0].view(0, 3),
    "transposed": lambda x: x.view(300, 700).t(),
    "permuted": lambda x: x.view(30, 100, 70).permute(2, 0, 1),
    "every other column": lambda x: x.view(300, 700)[:, ::2],
    "a column": lambda x: x.view(300, 700)[:, 3],
    "expanded": lambda x: x[:300].view(300, 1).expand(300, 500),
    "offset by one": lambda x: x[1:],
    "channels last": lambda x: x.view(30, 70, 10, 10).contiguous(memory_format=torch.channels_last),
    "parameter": lambda x: torch.nn.Parameter(x.view(700, 300)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_shapes_and_strides(shape, dtype, monkeypatch):
    monkeypatch.setattr(cast_tally, "CPU_CHUNK", 2**13)
    torch.manual_seed(0)
    base = torch.randn(210_000) * 0.02
    base[[7, 5000, 100_000]] = torch.tensor([70000.0, torch.nan, 1e-9])
    tensor = SHAPES[shape](base.to(dtype))
    cast = CheckedCast()
    image = cast("w", tensor)
    expected, counts = reference(tensor)
    assert image.shape == tensor.shape
    assert same_bits(image, expected)
    assert cast.total() == counts
    assert as_on_a_device(tensor.detach(), torch.float16, False)[1] == counts
    assert (image is tensor) == (dtype == torch.float16)
    assert dtype == torch.float16 or not image.requires_grad


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("fill", (0.02, 1e-7, 1e-9, 0.0, 1e30, math.inf, math.nan))
def test_every_value_alike_over_several_chunks(fill, threads):
    """Counts that fill the lanes in which they are summed, and rows that all ask for a closer look."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensor = torch.full((2 * cast_tally.CPU_CHUNK + 5,), fill)
        cast = CheckedCast()
        cast("w", tensor)
        assert cast.total() == reference(tensor)[1]
    finally:
        torch.set_num_threads(before)


@settings(max_examples=100, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30), st.lists(st.integers(0, 30), max_size=4), st.randoms())
def test_counts_of_parts_in_any_order_merge_to_those_of_the_whole(values, cuts, order: random.Random):
    whole = torch.tensor(values, dtype=torch.float64)
    parts = list(whole.tensor_split(sorted(cuts)))
    order.shuffle(parts)
    one_name, names, expected = CheckedCast(), CheckedCast(), reference(whole)[1]
    for index, part in enumerate(parts):
        one_name("w", part)
        names(str(index), part)
    assert one_name.counts() == {"w": expected}
    assert names.total() == expected == reduce(add, names.counts().values(), CastCounts())
    assert list(names.counts()) == [str(index) for index in range(len(parts))]


def test_only_floats_are_counted():
    cast = CheckedCast()
    for tensor in (torch.arange(5), torch.tensor([True]), torch.ones(2, dtype=torch.uint8)):
        assert cast("ids", tensor) is tensor
    assert cast.counts() == {}
    assert cast.total() == CastCounts()
    cast.check()
    for dtype in (torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(ValueError, match="^scales is torch.*only torch.float16"):
            cast("scales", torch.ones(2).to(dtype))


@pytest.mark.parametrize("arguments", ({"dtype": torch.float64}, {"dtype": torch.int8}, {"on_overflow": "raise"}))
def test_what_it_cannot_cast_to(arguments):
    with pytest.raises(ValueError, match="must be"):
        CheckedCast(**arguments)


LARGE = torch.tensor([1.0, 70000.0, -1e9])


@pytest.mark.parametrize(
    ("policy", "image", "raises"),
    (
        ("error", [1.0, math.inf, -math.inf], True),
        ("clamp", [1.0, 65504.0, -65504.0], False),
        ("ignore", [1.0, math.inf, -math.inf], False),
    ),
)
def test_policies_on_overflow(policy, image, raises):
    cast = CheckedCast(on_overflow=policy)
    assert cast("model.norm.weight", LARGE).tolist() == image
    assert cast.total() == CastCounts(values=3, overflow=2, max_abs=1e9)
    if not raises:
        cast.check()
        return
    with pytest.raises(WeightOverflow) as error:
        cast.check()
    assert str(error.value) == (
        "2 weights are beyond the range of float16 (65504), in 1 tensor: model.norm.weight (2 of 3, largest magnitude "
        "1e+09). Fix: train and roll out in bfloat16, or, if these few may be cut to the largest number, cut them "
        "in the checkpoint ('clamp' cuts what is cast here; a forward pass in the same dtype makes inf of the weights "
        "themselves)"
    )


@pytest.mark.parametrize(("policy", "raises"), (("error", True), ("clamp", True), ("ignore", False)))
def test_what_was_not_finite_before_is_a_fault_and_no_large_weight(policy, raises):
    cast = CheckedCast(on_overflow=policy)
    image = cast("w", torch.tensor([math.inf, -math.inf, math.nan, 2.0]))
    assert torch.equal(image.nan_to_num(nan=-1), torch.tensor([65504.0, -65504.0, -1.0, 2.0]).half())
    assert image.isfinite().tolist() == [False, False, False, True]
    assert cast.total() == CastCounts(values=4, non_finite=3, max_abs=2.0)
    if not raises:
        cast.check()
        return
    with pytest.raises(WeightOverflow, match=r"^3 weights are inf or nan, in 1 tensor: w \(3 of 4\). Fix: "):
        cast.check()


def test_the_message_names_the_worst_few_and_how_many_more():
    counts = {f"layer.{index}": CastCounts(10, overflow=1, max_abs=70000.0 + index) for index in range(12)}
    counts |= {"fine": CastCounts(10, max_abs=1.0)}
    message = overflow_message(counts, torch.float16)
    assert message.startswith("12 weights are beyond the range of float16 (65504), in 12 tensors: layer.11 (1 of 10, ")
    assert "layer.7 " in message and "layer.6 " not in message and "fine" not in message
    assert "; and 7 more. Fix: " in message
    assert overflow_message({"fine": counts["fine"]}, torch.float16) == ""
    assert "1 weight is beyond the range of bfloat16 (3.38953e+38)" in overflow_message(
        {"w": CastCounts(10, overflow=1, max_abs=3.4e38)}, torch.bfloat16
    )


def test_overflow_and_faults_are_told_together():
    cast = CheckedCast()
    cast("a", LARGE)
    cast("b", torch.tensor([math.nan]))
    with pytest.raises(WeightOverflow) as error:
        cast.check()
    first, second = str(error.value).splitlines()
    assert "beyond the range" in first and "a (2 of 3" in first
    assert "1 weight is inf or nan" in second and "b (1 of 1)" in second


@pytest.mark.parametrize("gapped", (
    torch.randn(2, 19000)[:, ::2],
    torch.randn(2, 150, 96)[:, :, :70],
    torch.randn(1, 1, 3, 3000)[..., 1::2],
    torch.tensor(1.5).expand(1, 15000),
    torch.randn(9000, 2)[:, 1],
))  # fmt: skip
def test_slices_larger_than_a_chunk(gapped, monkeypatch):
    monkeypatch.setattr(cast_tally, "CPU_CHUNK", 2**10)
    cast = CheckedCast()
    image, counts = reference(gapped)
    assert same_bits(cast("w", gapped), image)
    assert cast.total() == counts
    elsewhere, found = as_on_a_device(gapped, torch.float16, False)
    assert same_bits(elsewhere, image) and found == counts


class LargestOutput(TorchDispatchMode):
    """Bytes of the largest new storage that an operation returned, the image's left out."""

    def __init__(self, image: int) -> None:
        super().__init__()
        self.bytes = 0
        self._image = image

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                size = tensor.untyped_storage().nbytes()
                if size != self._image or not function.overloadpacket.__name__.startswith("empty"):
                    self.bytes = max(self.bytes, size)
        return result


@pytest.mark.parametrize("fill", (None, 0.0, 1e-9, 1e30, math.nan))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16))
@pytest.mark.parametrize("gaps", (False, True))
def test_no_temporary_grows_with_the_tensor(fill, dtype, gaps, monkeypatch):
    monkeypatch.setattr(cast_tally, "CPU_CHUNK", 2**11)
    monkeypatch.setattr(cast_tally, "DEVICE_CHUNK", 2**11)
    tensor = (torch.randn(512, 1024) if fill is None else torch.full((512, 1024), fill)).to(dtype)
    tensor = tensor[:, ::2] if gaps else tensor
    size = tensor.numel() * 2
    bound = 2**11 * torch.get_num_threads() * 8
    assert bound < size / 8
    with LargestOutput(size) as here:
        CheckedCast()("w", tensor)
    image = tensor if dtype == torch.float16 else cast_tally.empty_image(tensor, torch.float16)
    with LargestOutput(size) as elsewhere:
        cast_tally.tally_on_device(tensor, image, clamp=True)
    assert 0 < here.bytes <= bound
    assert 0 < elsewhere.bytes <= bound


def test_numbers_of_all_tensors_are_read_together():
    """Only a GPU has numbers that wait to be read: the CPU's path is made to look like one."""
    reads = []

    class CountReads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            reads.append(function.overloadpacket.__name__ == "stack")
            return function(*args, **(kwargs or {}))

    from verl_fp16 import weight_cast

    cast = CheckedCast()
    tensors = {"a": LARGE, "b": torch.randn(5000), "c": torch.zeros(0)}
    for name, tensor in [*tensors.items(), ("a", LARGE)]:
        image, _ = as_on_a_device(tensor, torch.float16, False)
        found = cast_tally.tally_on_device(tensor, image, False)
        cast._counted.append(weight_cast._Pending(name, tensor.dtype, found))
    with CountReads():
        counts = cast.counts()
    assert sum(reads) == 1
    expected = {name: reference(tensor)[1] for name, tensor in tensors.items()}
    assert counts == {**expected, "a": expected["a"] + expected["a"]}
    assert cast.counts() == counts
