"""What differs from the CPU: CUDA autocast, NCCL, fused AdamW. Skipped without CUDA."""

from __future__ import annotations

import pytest
import torch

from verl_fp16.loss_scaling import LossScaler
from verl_fp16.settings import LossScaleSettings


@pytest.fixture(scope="module")
def nccl(tmp_path_factory):
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("fused", (False, True))
def test_skipped_step_changes_nothing_on_cuda(fused):
    parameter = torch.nn.Parameter(torch.ones(1024, device="cuda"))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    scaler = LossScaler(LossScaleSettings(), "cuda")
    for overflow in (False, True):
        before = parameter.detach().clone()
        optimizer.zero_grad()
        scaler.scale((parameter * parameter).sum()).backward()
        if overflow:
            parameter.grad[7] = torch.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.last_step_skipped is overflow
        assert torch.equal(parameter, before) is overflow
    assert scaler.scale_value == 32768.0


@pytest.mark.parametrize("strategy", ("fsdp", "fsdp2"))
def test_fp16_engine_on_cuda(nccl, tiny_model, monkeypatch, strategy):
    import verl  # noqa: F401

    from verl_fp16 import standalone

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    engine = standalone.build_engine(
        str(tiny_model), precision=standalone.mixed_precision("float16"), strategy=strategy
    )
    assert engine._autocast_dtype is torch.float16
    assert isinstance(engine.scaler, LossScaler)
    sequences = [list(range(start, start + 8)) for start in range(8)]
    norms = [standalone.train_step(engine, standalone.make_batch(sequences))["grad_norm"] for _ in range(4)]
    assert 0 < norms[-1] < norms[0]
    assert engine.scaler.skipped_total == 0
