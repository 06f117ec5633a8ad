"""The first module whose output is not finite; and that to look for it changes, reads and leaves nothing."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from verl_fp16 import attribution, module_trace
from verl_fp16.module_trace import ModuleTrace, NonFiniteOutput


class Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return x * self.factor


class Returns(nn.Module):
    """Returns what it is told to, whatever comes in."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *args, **kwargs):
        return self.output


def test_the_innermost_module_that_overflows_is_named_with_the_input_that_it_got():
    inner = nn.Sequential(Times(4.0), Times(1e38), Times(2.0))
    with ModuleTrace(nn.Sequential(Times(2.0), inner, Times(1.0))) as trace:
        trace._module(torch.tensor([0.25, -3.0, 0.25]))
    assert trace.first_non_finite() == NonFiniteOutput("1.1", "Times", 1, 0, 3, 24.0, 0)


def test_nan_that_came_in_is_told_from_overflow():
    with ModuleTrace(nn.Sequential(Times(2.0))) as trace:
        trace._module(torch.tensor([1.0, torch.nan, -5.0, torch.inf]))
    assert trace.first_non_finite() == NonFiniteOutput("0", "Times", 1, 1, 4, 5.0, 2)


def test_a_fault_in_the_models_own_code_is_the_models():
    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Times(0.0)

        def forward(self, x):
            return 1 / self.inner(x)

    with ModuleTrace(Divides()) as trace:
        trace._module(torch.ones(3))
    assert trace.first_non_finite() == NonFiniteOutput("(the model)", "Divides", 3, 0, 3, 1.0, 0)


def test_a_large_tensor_is_looked_at_in_pieces(monkeypatch):
    monkeypatch.setattr(module_trace, "PIECE", 7)
    monkeypatch.setattr(attribution, "PIECE", 7)
    values = torch.full((4, 10), 3.0)
    values[1, 5], values[2, 0], values[3, 9] = torch.nan, -torch.inf, 1e38
    with ModuleTrace(Times(4.0)) as trace:
        trace._module(values.t())
    assert trace.first_non_finite() == NonFiniteOutput("(the model)", "Times", 2, 1, 40, values[3, 9].item(), 2)


def test_a_finite_pass_and_a_trace_without_a_pass_give_none():
    trace = ModuleTrace(nn.Sequential(Times(2.0)))
    assert trace.first_non_finite() is None
    with trace:
        trace._module(torch.ones(3))
    assert trace.first_non_finite() is None


@settings(max_examples=60, deadline=None)
@given(
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    batches=st.lists(st.lists(st.floats(0.5, 2.0, width=32), min_size=1, max_size=3), min_size=1, max_size=3),
    data=st.data(),
)
def test_wherever_the_overflow_is_planted_there_it_is_found(depths, batches, data):
    model = nn.Sequential(*(nn.Sequential(*(Times(1.0) for _ in range(depth))) for depth in depths))
    outer = data.draw(st.integers(0, len(depths) - 1))
    inner = data.draw(st.integers(0, depths[outer] - 1))
    bad_batch = data.draw(st.integers(0, len(batches) - 1))
    bad = model[outer][inner]
    with ModuleTrace(model) as trace:
        for number, batch in enumerate(batches):
            with torch.no_grad():
                bad.factor.fill_(3e38 if number == bad_batch else 1.0)
            model(torch.tensor(batch) * 4)
    assert trace.first_non_finite() == NonFiniteOutput(
        f"{outer}.{inner}", "Times", len(batches[bad_batch]), 0, len(batches[bad_batch]), max(batches[bad_batch]) * 4, 0
    )


BAD = torch.tensor([1.0, torch.inf, torch.nan, torch.nan])
GOOD = torch.ones(2, 3)
Pair = namedtuple("Pair", "first second")


@dataclass
class Plain:
    values: object
    other: object = None


@pytest.mark.parametrize(
    ("output", "elements"),
    [
        (BAD, 4),
        ((GOOD, BAD), 10),
        ([GOOD, [BAD, None]], 10),
        (Pair(GOOD, {"deep": (BAD, "text")}), 10),
        (OrderedDict(a=BAD, b=torch.ones(2, dtype=torch.int64)), 4),
        (CausalLMOutput(logits=BAD, hidden_states=(GOOD, BAD)), 10),
        (Plain([GOOD], Plain(BAD)), 10),
        (torch.nested.as_nested_tensor([BAD, GOOD[0]], layout=torch.jagged), 7),
        ((torch.ones(0), BAD.half()), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outputs_of_every_shape_are_looked_into_and_each_tensor_once(output, elements):
    with ModuleTrace(nn.Sequential(Returns(output))) as trace:
        trace._module[0](GOOD * 3, mask=torch.tensor([True]), scale=GOOD * -7, empty=torch.ones(0))
    assert trace.first_non_finite() == NonFiniteOutput("0", "Returns", 1, 2, elements, 7.0, 0)


@pytest.mark.parametrize("output", (None, "text", torch.ones(0), torch.tensor([1, 2]), {"flag": torch.tensor(True)}))
def test_outputs_without_floating_elements_are_passed_over(output):
    with ModuleTrace(Returns(output)) as trace:
        trace._module(BAD)
    assert trace.first_non_finite() is None


def test_without_floating_inputs_the_largest_input_is_zero():
    with ModuleTrace(Returns(BAD)) as trace:
        trace._module(torch.tensor([5]))
    assert trace.first_non_finite() == NonFiniteOutput("(the model)", "Returns", 1, 2, 4, 0.0, 0)


class Checkpointed(nn.Module):
    """Computes its inner modules again in the backward pass."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), OverflowsInBackward(), nn.Linear(4, 4))
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class OverflowsInBackward(nn.Module):
    """Finite in the forward pass, infinite when that is computed again."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1.0 if self.calls % 2 else torch.inf)


@pytest.mark.parametrize("reentrant", (False, True))
def test_what_checkpointing_computes_again_is_not_looked_at(reentrant):
    model = Checkpointed(reentrant)
    with ModuleTrace(model) as trace:
        for _ in range(2):
            model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert model.inner[1].calls == 4, "each forward pass was computed again"
    assert trace.first_non_finite() is None


def _hooks(model: nn.Module) -> list:
    return [
        len(value)
        for module in model.modules()
        for name, value in sorted(vars(module).items())
        if "hook" in name and hasattr(value, "__len__")
    ]


def test_no_hook_is_left_behind_even_by_a_pass_that_failed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model[0].register_forward_hook(lambda module, args, output: None)
    before = _hooks(model)
    with pytest.raises(RuntimeError, match="shapes"), ModuleTrace(model):
        assert _hooks(model) != before
        model(torch.ones(2, 5))
    assert _hooks(model) == before


def test_a_trace_starts_once_and_anew_after_it_was_stopped():
    trace = ModuleTrace(nn.Sequential(Times(3e38)))
    trace.start()
    with pytest.raises(RuntimeError, match="started already"):
        trace.start()
    trace._module(torch.full((1,), 4.0))
    trace.stop()
    trace.stop()
    assert trace.first_non_finite().module == "0"
    trace._module(torch.full((1,), 4.0))
    with trace:
        assert trace.first_non_finite() is None


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("autocast", (False, True))
def test_outputs_gradients_and_random_numbers_are_bit_identical_with_and_without(reentrant, autocast):
    def run(traced: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Dropout(0.5), Checkpointed(reentrant), nn.LayerNorm(4))
        model[3].inner[1] = nn.Dropout(0.3)
        trace = ModuleTrace(model)
        if traced:
            trace.start()
        outputs = []
        for _ in range(3):
            with torch.autocast("cpu", torch.float16, enabled=autocast):
                outputs.append(model(torch.randn(5, 8)))
            outputs[-1].square().sum().backward()
        return [*outputs, *(parameter.grad for parameter in model.parameters()), torch.rand(3)]

    for with_trace, without in zip(run(True), run(False), strict=True):
        assert with_trace.dtype == without.dtype
        assert torch.equal(with_trace, without)


def test_nothing_is_read_before_the_end_and_then_once(monkeypatch):
    model, reads = nn.Sequential(*(Times(2.0) for _ in range(10)), Times(1e38)), []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, name=name, original=original: reads.append(name) or original(*args)
        )
    with ModuleTrace(model) as trace:
        for _ in range(3):
            model(torch.ones(3))
    assert reads == []
    assert trace.first_non_finite().module == "10"
    assert reads == ["tolist"]


def test_what_is_kept_of_a_call_does_not_grow_with_its_output():
    with ModuleTrace(nn.Sequential(Times(2.0))) as trace:
        trace._module(torch.ones(1000, 1000))
    kept = [call.statistics for call in trace._calls]
    assert [tensor.untyped_storage().nbytes() for tensor in kept] == [32, 32]
    assert not any(tensor.requires_grad for tensor in kept)
