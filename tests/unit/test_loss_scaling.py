"""The loss scaler against a slow reference model, and what a skipped update leaves behind."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_fp16.loss_scale_settings import FORWARD, GRADIENT, NORM
from verl_fp16.loss_scaling import LossScaler, LossScaleStateError, Updates
from verl_fp16.settings import LossScaleSettings


def _model(value: float = 1.0) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    parameter = torch.nn.Parameter(torch.full((3,), value))
    return parameter, torch.optim.AdamW([parameter], lr=0.1)


def _update(
    scaler: LossScaler, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, fault: str | None = None
) -> None:
    optimizer.zero_grad()
    loss = (parameter * parameter).sum()
    scaler.scale(loss).backward()
    scaler.note_forward(math.nan if fault == FORWARD else loss.item(), [loss])
    if fault in (FORWARD, GRADIENT):
        parameter.grad[1] = torch.nan
    scaler.unscale_(optimizer)
    scaler.step(optimizer, math.inf if fault == NORM else 1.0)
    scaler.update()


def reference_scales(s: LossScaleSettings, faults: list[str | None]) -> list[float]:
    """Loss scaling, written for reading: the scale after each update."""
    scale, good, scales = s.init, 0, []
    for fault in faults:
        if s.mode == "dynamic" and fault == GRADIENT:
            scale, good = max(scale * s.backoff_factor, s.min), 0
        elif s.mode == "dynamic" and fault is None:
            good += 1
            if good == s.growth_interval:
                good = 0
                grown = scale * s.growth_factor
                if s.max is not None:
                    grown = min(grown, s.max)
                if grown <= 2.0**100:
                    scale = grown
        scales.append(scale)
    return scales


FAULTS = st.lists(st.sampled_from([None, None, None, GRADIENT, GRADIENT, FORWARD, NORM]), max_size=60)
SETTINGS = st.builds(
    LossScaleSettings,
    init=st.sampled_from([1.0, 2.0, 1000.0, 65536.0]),
    growth_factor=st.sampled_from([1.5, 2.0, 4.0]),
    backoff_factor=st.sampled_from([0.25, 0.5, 0.9]),
    growth_interval=st.integers(1, 7),
    min=st.sampled_from([0.5, 1.0]),
    max=st.sampled_from([None, 65536.0, 100000.0]),
    mode=st.sampled_from(["dynamic", "dynamic", "static"]),
    max_consecutive_skips=st.integers(1, 5),
)


@settings(max_examples=2000, deadline=None)
@given(faults=FAULTS, chosen=SETTINGS, saved_after=st.integers(0, 60))
def test_scale_and_counts_follow_the_reference_model_also_through_a_resume(faults, chosen, saved_after):
    scaler = LossScaler(chosen, "cpu")
    parameter, optimizer = _model()
    reference = reference_scales(chosen, faults)
    in_a_row, since_overflow = 0, 0
    for number, (fault, scale) in enumerate(zip(faults, reference, strict=True), 1):
        assert scaler.update_number == number
        before = scaler.scale_value
        _update(scaler, optimizer, parameter, fault)
        assert scaler.fault == fault
        in_a_row = in_a_row + 1 if fault else 0
        since_overflow = since_overflow + 1 if fault in (FORWARD, NORM) else 0
        assert scaler.consecutive_skips == in_a_row
        assert scaler.scale_value == scale
        no_cure = since_overflow >= chosen.max_consecutive_skips
        hopeless = no_cure or chosen.mode == "static" or scale <= chosen.min
        assert scaler.stuck == (in_a_row >= chosen.max_consecutive_skips and scale == before and hopeless)
        if number == saved_after:
            state = json.loads(json.dumps(scaler.state_dict()))
            scaler = LossScaler(chosen, "cpu")
            gave_up = in_a_row >= chosen.max_consecutive_skips
            in_a_row, since_overflow = (0, 0) if gave_up else (in_a_row, since_overflow)
            assert len(scaler.load_state_dict(state)) == gave_up
            counts = {"consecutive_skips": in_a_row, "skips_since_overflow": since_overflow}
            assert scaler.state_dict() == {**state, **counts}
    skipped = [fault for fault in faults if fault]
    assert scaler.total == Updates(len(faults) - len(skipped), len(skipped), skipped.count(FORWARD))
    assert scaler.total.since(Updates(0, 1, 1)).skipped == len(skipped) - 1


@pytest.mark.parametrize("bad", (torch.inf, -torch.inf, torch.nan))
@pytest.mark.parametrize("adam", ({}, {"fused": True}, {"foreach": True}, {"amsgrad": True}))
def test_skipped_update_changes_nothing(bad, adam):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, **adam)
    scaler = LossScaler(LossScaleSettings(), "cpu")
    _update(scaler, optimizer, parameter)
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


@pytest.mark.parametrize("bad", (torch.inf, -torch.inf, torch.nan))
@pytest.mark.parametrize("place", ("loss", "output", "half-precision output"))
def test_a_fault_of_the_forward_pass_skips_and_leaves_the_scale_alone(bad, place):
    parameter, optimizer = _model()
    scaler = LossScaler(LossScaleSettings(), "cpu")
    before = parameter.detach().clone()
    dtype = torch.float16 if place.startswith("half") else torch.float32
    output = torch.tensor([[0.5, bad]], dtype=dtype) if place != "loss" else torch.tensor([0.5])
    scaler.scale(parameter.sum()).backward()
    scaler.note_forward(bad if place == "loss" else 1.0, [torch.ones(4), output])
    scaler.note_forward(1.0, [torch.ones(2)])
    scaler.unscale_(optimizer)
    assert scaler.forward_fault_here()
    scaler.step(optimizer, 1.0)
    scaler.update()
    assert scaler.fault == FORWARD
    assert scaler.scale_value == 65536.0
    assert torch.equal(parameter, before)
    _update(scaler, optimizer, parameter)
    assert scaler.fault is None, "what was noted is forgotten with its update"
    assert not scaler.forward_fault_here()


def test_what_is_judged_keeps_its_values():
    parameter, optimizer = _model()
    scaler = LossScaler(LossScaleSettings(), "cpu")
    output = torch.randn(100)
    kept = output.clone()
    scaler.scale(parameter.sum()).backward()
    scaler.note_forward(1.0, [output])
    scaler.unscale_(optimizer)
    assert torch.equal(output, kept)


def test_a_norm_that_overflows_is_a_skip_and_not_an_update_of_zeros():
    parameter, optimizer = _model()
    scaler = LossScaler(LossScaleSettings(), "cpu")
    before = parameter.detach().clone()
    parameter.grad = torch.full((3,), 3e38)
    scaler._unscaled = True  # as they come out of unscale_
    norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0).item()
    assert norm == math.inf and not parameter.grad.any(), "clipping by it leaves zeros"
    scaler.step(optimizer, norm)
    scaler.update()
    assert scaler.fault == NORM
    assert scaler.scale_value == 65536.0, "the norm is of unscaled gradients"
    assert torch.equal(parameter, before)


def test_gradients_come_out_unscaled_to_the_bit():
    """A power of two as scale changes no bit: the unscaled gradient is the gradient."""
    parameter, optimizer = _model(0.3)
    scaler = LossScaler(LossScaleSettings(init=2.0**14), "cpu")
    scaler.scale((parameter**3).sum()).backward()
    scaler.unscale_(optimizer)
    other = torch.nn.Parameter(torch.full((3,), 0.3))
    (other**3).sum().backward()
    assert torch.equal(parameter.grad, other.grad)


def test_gradients_are_divided_by_the_scale_that_the_loss_was_multiplied_by():
    """Also after the scale has moved, down and up."""
    parameter, optimizer = _model(1.0)
    scaler = LossScaler(LossScaleSettings(init=1024.0, growth_interval=2), "cpu")
    for fault in (None, GRADIENT, None, None, None):
        scale = scaler.scale_value
        optimizer.zero_grad()
        scaler.scale(parameter.sum()).backward()
        assert torch.equal(parameter.grad, torch.full((3,), scale))
        if fault:
            parameter.grad[0] = torch.inf
        scaler.unscale_(optimizer)
        assert torch.equal(parameter.grad[1:], torch.ones(2)), f"at scale {scale}"
        scaler.step(optimizer)
        scaler.update()
    assert scaler.scale_value == 1024.0, "it went to 512 and came back"


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
        _update(scaler, optimizer, parameter)
    assert scaler.scale_value == 2.0**100


def test_an_interval_that_was_lowered_since_the_state_was_saved_still_grows():
    before = LossScaler(LossScaleSettings(growth_interval=400), "cpu")
    before.growth_tracker = 300
    after = LossScaler(LossScaleSettings(growth_interval=100), "cpu")
    after.load_state_dict(before.state_dict())
    parameter, optimizer = _model()
    _update(after, optimizer, parameter)
    assert after.scale_value == 131072.0


@pytest.mark.parametrize(
    ("chosen", "scale", "said"),
    (
        (LossScaleSettings(max=1024.0, init=64.0), 1024.0, "the saved loss scale 65536 became 1024"),
        (LossScaleSettings(min=2.0**17, init=2.0**17), 2.0**17, "the saved loss scale 65536 became 131072"),
        (LossScaleSettings(mode="static", init=8.0), 8.0, "became 8: loss_scale.mode is static"),
        (LossScaleSettings(init=4.0), 65536.0, ""),
    ),
)
def test_the_settings_of_the_resumed_run_bound_the_saved_scale(chosen, scale, said):
    scaler = LossScaler(chosen, "cpu")
    changes = scaler.load_state_dict(LossScaler(LossScaleSettings(), "cpu").state_dict())
    assert scaler.scale_value == scale
    assert len(changes) == bool(said)
    assert said in "".join(changes)


@pytest.mark.parametrize(
    "change",
    (
        {"format": 2},
        {"scale": "big"},
        {"scale": math.nan},
        {"scale": 0.0},
        {"scale": math.inf},
        {"scale": 10**400},
        {"growth_tracker": -1},
        {"growth_tracker": 1.5},
        {"skipped_total": None},
    ),
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(change):
    scaler = LossScaler(LossScaleSettings(init=8.0), "cpu")
    kept = scaler.state_dict()
    with pytest.raises(LossScaleStateError, match="format|number"):
        scaler.load_state_dict({**LossScaler(LossScaleSettings(), "cpu").state_dict(), **change})
    assert scaler.state_dict() == kept


def test_a_run_that_overflows_all_the_way_down_is_not_stuck_before_it_is_there():
    scaler = LossScaler(LossScaleSettings(init=2.0**40, max_consecutive_skips=3), "cpu")
    parameter, optimizer = _model()
    for fault in (GRADIENT, GRADIENT, FORWARD):
        _update(scaler, optimizer, parameter, fault)
    assert not scaler.stuck, "it is far above its floor"
    for _ in range(2):
        _update(scaler, optimizer, parameter, FORWARD)
    assert scaler.stuck, "three in a row that no scale cures"
    _update(scaler, optimizer, parameter, GRADIENT)
    assert not scaler.stuck
    scaler.scale_value = 1.0
    _update(scaler, optimizer, parameter, GRADIENT)
    assert scaler.stuck


def test_an_update_that_is_dropped_is_forgotten():
    parameter, optimizer = _model()
    scaler = LossScaler(LossScaleSettings(), "cpu")
    scaler.note_forward(math.nan, [torch.tensor([math.nan])])
    scaler.unscale_(optimizer)
    scaler.abandon()
    _update(scaler, optimizer, parameter)
    assert scaler.fault is None and scaler.total == Updates(applied=1)


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
