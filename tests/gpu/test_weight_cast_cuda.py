"""The checked cast on a GPU: the CPU's image and counts, and nothing that makes the host wait."""

from __future__ import annotations

import math

import pytest
import torch

from verl_fp16.weight_cast import OVERFLOW_POLICIES, CheckedCast


@pytest.mark.parametrize("policy", OVERFLOW_POLICIES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_gpu_gives_what_the_cpu_gives(policy, dtype):
    torch.manual_seed(0)
    weights = torch.randn(300, 7001) * 0.02
    weights.view(-1)[:6] = torch.tensor([7e4, -1e9, math.inf, math.nan, 1e-9, 2.0**-15])
    tensors = {"w": weights.to(dtype), "strided": weights.to(dtype)[:, ::2], "empty": torch.zeros(0, dtype=dtype)}
    on_cpu, on_gpu = CheckedCast(on_overflow=policy), CheckedCast(on_overflow=policy)
    there = {name: tensor.cuda() for name, tensor in tensors.items()}
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = {name: on_gpu(name, tensor) for name, tensor in there.items()}
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for name, tensor in tensors.items():
        assert torch.equal(images[name].cpu().nan_to_num(nan=7), on_cpu(name, tensor).nan_to_num(nan=7))
    assert on_gpu.counts() == on_cpu.counts()
