"""The gap's statistics on a GPU: the CPU's numbers, and nothing that makes the host wait until they are asked for."""

from __future__ import annotations

import math

import pytest
import torch

from verl_fp16.mismatch.first_mini_batch import FirstMiniBatch
from verl_fp16.mismatch.statistics import GapStatistics


def make_batch(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rollout = -3 * torch.rand(97, 1031, generator=generator)
    training = rollout + 1e-2 * torch.randn(rollout.shape, generator=generator)
    mask = (torch.arange(1031) < torch.randint(0, 1032, (97, 1), generator=generator)).long()
    rollout[0, 0], rollout[3, 2], training[5, 1] = -math.inf, math.nan, math.inf
    mask[[0, 3, 5], :3] = 1
    return [rollout.to(dtype), training.to(dtype), mask]


def without_waiting(work) -> None:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_gpu_gives_what_the_cpu_gives(dtype):
    batch = make_batch(dtype)
    there = [tensor.cuda() for tensor in batch]
    on_cpu, on_gpu = GapStatistics(), GapStatistics("cuda")
    torch.cuda.synchronize()
    on_cpu.add(*batch)
    without_waiting(lambda: on_gpu.add(*there))
    expected, found = on_cpu.scalars(), on_gpu.scalars()
    assert found == {name: pytest.approx(value, rel=1e-9, abs=1e-12) for name, value in expected.items()}
    assert on_gpu.curves() == {
        name: [{key: pytest.approx(value, rel=1e-9, abs=1e-12) for key, value in row.items()} for row in rows]
        for name, rows in on_cpu.curves().items()
    }


def test_packed_tokens_on_a_gpu():
    rollout, training, mask = make_batch()
    keep = torch.randint(1, 1032, (97,), generator=torch.Generator().manual_seed(1))
    rows = [tensor[row, : keep[row]] for tensor in (rollout, training, mask) for row in range(97)]
    packed = [torch.cat(rows[start : start + 97]) for start in (0, 97, 194)]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), keep.cumsum(0)])
    on_cpu, on_gpu = GapStatistics(), GapStatistics("cuda")
    on_cpu.add_packed(*packed, offsets)
    there = [tensor.cuda() for tensor in (*packed, offsets)]
    without_waiting(lambda: on_gpu.add_packed(*there))
    expected = on_cpu.scalars()
    assert on_gpu.scalars() == {name: pytest.approx(value, rel=1e-9, abs=1e-12) for name, value in expected.items()}


def test_evidence_of_micro_batches_on_a_gpu():
    batch = make_batch()
    tokens = torch.arange(batch[0].numel()).reshape(batch[0].shape)
    first, there = FirstMiniBatch(), FirstMiniBatch()
    for side, device in ((first, "cpu"), (there, "cuda")):
        side.begin()
        for part in (slice(0, 40), slice(40, 97)):
            side.take(*(tensor[part].to(device) for tensor in (*batch, tokens)))
    assert there.end(True) == {name: pytest.approx(value, rel=1e-9) for name, value in first.end(True).items()}
    (on_cpu, _), (on_gpu, _) = first.evidence(50, 20), there.evidence(50, 20)
    assert [t[:8] for t in on_gpu.tokens] == [t[:8] for t in on_cpu.tokens]
