"""The loss scaler against a slow reference model, and what a skipped step leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_fp16.loss_scaling import LossScaler
from verl_fp16.settings import LossScaleSettings


def _model(value: float = 1.0) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    parameter = torch.nn.Parameter(torch.full((3,), value))
    return parameter, torch.optim.AdamW([parameter], lr=0.1)


def _update(
    scaler: LossScaler, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, overflow: bool
) -> None:
    optimizer.zero_grad()
    scaler.scale((parameter * parameter).sum()).backward()
    if overflow:
        parameter.grad[1] = torch.nan
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def reference_scales(s: LossScaleSettings, overflows: list[bool]) -> list[float]:
    """Dynamic loss scaling, written for reading: the scale after each update."""
    scale, good, scales = s.init, 0, []
    for overflow in overflows:
        if overflow:
            scale, good = max(scale * s.backoff_factor, s.min), 0
        else:
            good += 1
            if good == s.growth_interval:
                scale, good = scale * s.growth_factor, 0
        scales.append(scale)
    return scales


@settings(max_examples=300, deadline=None)
@given(
    overflows=st.lists(st.booleans(), max_size=60),
    interval=st.integers(1, 7),
    init=st.sampled_from([1.0, 2.0, 1000.0, 65536.0]),
    growth=st.sampled_from([1.5, 2.0, 4.0]),
    backoff=st.sampled_from([0.25, 0.5, 0.9]),
    floor=st.sampled_from([0.5, 1.0]),
)
def test_scale_follows_the_reference_model(overflows, interval, init, growth, backoff, floor):
    chosen = LossScaleSettings(init, growth, backoff, interval, floor)
    scaler = LossScaler(chosen, "cpu")
    parameter, optimizer = _model()
    seen = []
    for overflow in overflows:
        _update(scaler, optimizer, parameter, overflow)
        assert scaler.last_step_skipped is overflow
        seen.append(scaler.scale_value)
    assert seen == reference_scales(chosen, overflows)
    assert scaler.skipped_total == sum(overflows)
    assert scaler.applied_total == len(overflows) - sum(overflows)
    assert scaler.take_skipped() == sum(overflows)
    assert scaler.take_skipped() == 0


@pytest.mark.parametrize("bad", (torch.inf, -torch.inf, torch.nan))
@pytest.mark.parametrize("fused", (False, True))
def test_skipped_step_changes_nothing(bad, fused):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    scaler = LossScaler(LossScaleSettings(), "cpu")
    _update(scaler, optimizer, parameter, overflow=False)
    before, state = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    parameter.grad = torch.tensor([1.0, bad, 1.0])
    scaler.unscale_(optimizer)
    assert scaler.step(optimizer) is None
    scaler.update()
    assert torch.equal(parameter, before)
    after = optimizer.state_dict()
    for key, value in state["state"][0].items():
        assert torch.equal(value, after["state"][0][key]), key


def test_gradients_come_out_unscaled_to_the_bit():
    """A power of two as scale changes no bit: the unscaled gradient is the gradient."""
    parameter, optimizer = _model(0.3)
    scaler = LossScaler(LossScaleSettings(init=2.0**14), "cpu")
    scaler.scale((parameter**3).sum()).backward()
    scaler.unscale_(optimizer)
    other = torch.nn.Parameter(torch.full((3,), 0.3))
    (other**3).sum().backward()
    assert torch.equal(parameter.grad, other.grad)


def test_gradients_that_vanish_in_fp16_survive_with_the_scale():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = LossScaler(LossScaleSettings(), "cpu")
    tiny = torch.full((4,), 1e-9)

    def gradient(scaled: bool) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight * tiny).sum()
        # The gradient passes through FP16, as it does in a backward pass in half precision.
        handle = weight.register_hook(lambda g: g.half().float())
        (scaler.scale(loss) if scaled else loss).backward()
        handle.remove()
        return weight.grad.clone()

    assert torch.equal(gradient(scaled=False), torch.zeros(4))
    assert torch.allclose(gradient(scaled=True) / scaler.scale_value, tiny, rtol=1e-2)


def test_a_half_precision_loss_is_scaled_in_float32():
    loss = torch.tensor(2.0, dtype=torch.float16)
    assert LossScaler(LossScaleSettings(), "cpu").scale(loss).item() == 131072.0


def test_a_parameter_without_gradient_takes_no_part():
    with_grad, without = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([with_grad, without], lr=0.1)
    scaler = LossScaler(LossScaleSettings(), "cpu")
    scaler.scale(with_grad.sum()).backward()
    scaler.step(optimizer)  # unscales by itself
    scaler.update()
    assert torch.allclose(with_grad, torch.full((2,), 0.9))
    assert torch.equal(without, torch.ones(2))


def test_scale_stays_within_float32():
    scaler = LossScaler(LossScaleSettings(init=2.0**100, growth_interval=1), "cpu")
    parameter, optimizer = _model(0.0)
    for _ in range(3):
        _update(scaler, optimizer, parameter, overflow=False)
    assert scaler.scale_value == 2.0**100


def test_order_of_calls_is_checked():
    parameter, optimizer = _model()
    scaler = LossScaler(LossScaleSettings(), "cpu")
    with pytest.raises(RuntimeError, match="without step"):
        scaler.update()
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="without step"):
        scaler.update()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
