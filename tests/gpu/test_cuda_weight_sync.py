"""The weight sync's cores on CUDA: what the CPU gives, without waiting for the device. Skipped without CUDA."""

from __future__ import annotations

import pytest
import torch

from verl_fp16.weight_cast import CheckedCast
from verl_fp16.weight_sync.digest import additive_digest, as_unsigned, stream_digest
from verl_fp16.weight_sync.receiver import WeightReceiver
from verl_fp16.weight_sync.update_sample import UpdateSample


def weights() -> torch.Tensor:
    """A million values like weights, with some of every kind that is counted."""
    values = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)) * 0.02
    values.view(-1)[:7] = torch.tensor([1e5, -7e4, 65519.0, 1e-9, -1e-8, 3e-6, 0.0])
    return values


@pytest.mark.parametrize("policy", ("ignore", "clamp"))
def test_cast_and_counts_are_the_cpus(policy):
    there, here = CheckedCast(on_overflow=policy), CheckedCast(on_overflow=policy)
    on_device = weights().cuda()
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            image = there("w", on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(image.cpu().view(torch.int16), here("w", weights()).view(torch.int16))
    assert there.counts() == here.counts()


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_digests_are_the_cpus(dtype):
    tensor = weights().to(dtype)
    for digest in (stream_digest, additive_digest):
        assert as_unsigned(digest(tensor.cuda())) == as_unsigned(digest(tensor))
        assert as_unsigned(digest(tensor.cuda().t())) == as_unsigned(digest(tensor.t()))


def test_a_load_is_followed_on_cuda():
    held = torch.zeros(1000, 1000, dtype=torch.float16, device="cuda")
    receiver = WeightReceiver(lambda: [("w", held)])
    stream = [("a", weights().clamp(-1, 1)[:400].cuda()), ("b", weights().clamp(-1, 1)[400:].cuda())]

    def load() -> None:
        held[:400].copy_(stream[0][1])
        held[400:].copy_(stream[1][1])

    receiver.load(stream, load)
    assert receiver.report(torch.float16)["mismatches"] == []
    held[500, 3] += 1
    assert receiver.report(torch.float16)["mismatches"] == ["b (in w)"]


def test_the_sample_of_updates_is_the_cpus():
    found = []
    for device in ("cpu", "cuda"):
        sample = UpdateSample(torch.float16)
        for factor in (1.0, 1 + 1e-4):
            sample.take("w", (weights() * factor).to(device))
            counts = sample.read()
        found.append(counts)
    assert found[0] == found[1] and found[0]["changed"] > 900
