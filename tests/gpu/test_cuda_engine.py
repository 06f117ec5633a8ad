"""What differs from the CPU: CUDA autocast, NCCL, fused AdamW. Skipped without CUDA."""

from __future__ import annotations

import pytest
import torch
from gpu_ranks import needs

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


@needs("verl", "transformers")
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
    assert engine.scaler.total.skipped == 0


def _update(scaler, optimizer, parameters) -> None:
    optimizer.zero_grad()
    loss = sum((parameter * parameter).sum() for parameter in parameters)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if isinstance(scaler, LossScaler):
        scaler.step(optimizer, norm.item())
        scaler.update()
    else:
        scaler.step(optimizer)
        scaler.update()
        norm.item()


@pytest.mark.parametrize("adam", ({"foreach": True}, {"fused": True}))
def test_the_scaler_launches_no_more_kernels_and_waits_no_more_than_torchs(nccl, adam):
    import torch.distributed as dist
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    counted = {}
    for name in ("native", "ours"):
        parameters = [torch.nn.Parameter(torch.ones(256, device="cuda")) for _ in range(8)]
        # torch's scaler hands found_inf to a fused optimizer, whose shape it does not take.
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, **(adam if name == "ours" else {"foreach": True}))
        native = ShardedGradScaler(growth_interval=400, process_group=dist.group.WORLD)
        scaler = native if name == "native" else LossScaler(LossScaleSettings(), "cuda")
        for _ in range(3):
            _update(scaler, optimizer, parameters)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            _update(scaler, optimizer, parameters)
        names = [event.name for event in profile.events()]
        counted[name] = {
            "kernels": sum(n in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel") for n in names),
            "waits": sum(n == "cudaStreamSynchronize" for n in names),
        }
    assert counted["native"]["kernels"] > 5 and counted["native"]["waits"] >= 2
    assert counted["ours"]["kernels"] <= counted["native"]["kernels"], counted
    assert counted["ours"]["waits"] <= counted["native"]["waits"], counted


def test_gradients_under_cpu_offload_are_looked_at_too(nccl):
    """FSDP2's CPU offload policy leaves the gradients on the CPU, while the ranks agree on the GPU."""
    there, here = torch.nn.Parameter(torch.ones(4, device="cuda")), torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([there, here], lr=0.1)
    scaler = LossScaler(LossScaleSettings(), "cuda")
    for bad, skipped in ((1.0, False), (torch.inf, True)):
        there.grad, here.grad = torch.ones(4, device="cuda"), torch.tensor([1.0, bad, 1.0, 1.0])
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.last_step_skipped is skipped


@pytest.mark.parametrize("bad", ("loss", "output"))
def test_a_fault_of_the_forward_pass_is_told_apart_on_cuda(bad):
    parameter = torch.nn.Parameter(torch.ones(16, device="cuda"))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    scaler = LossScaler(LossScaleSettings(), "cuda")
    output = torch.zeros(8, device="cuda")
    if bad == "output":
        output[3] = -torch.inf
    scaler.scale((parameter * parameter).sum()).backward()
    scaler.note_forward(float("nan") if bad == "loss" else 1.0, [output])
    scaler.unscale_(optimizer)
    scaler.step(optimizer, 1.0)
    scaler.update()
    assert scaler.fault == "forward" and scaler.scale_value == 65536.0
    assert torch.equal(parameter.detach(), torch.ones(16, device="cuda"))
