"""The search for the largest loss scale that does not overflow, against gradients that are linear in the scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl_fp16.preflight.loss_scale_search import HIGHEST, LARGEST, LOWEST, search


@dataclass
class Pass:
    largest: float
    non_finite: int


def model_of(gradient: float, inner: float = 1.0):
    """A backward pass with one gradient, and one in it ``inner`` times as large, which nobody sees; in float16."""
    scales = []

    def backward(scale: float) -> Pass:
        scales.append(scale)
        value = torch.tensor([gradient * scale, gradient * scale * inner], dtype=torch.float64).half()
        shown = float(value[0])
        return Pass(shown if math.isfinite(shown) else 0.0, int((~value.isfinite()).sum()))

    return backward, scales


def largest_exponent(gradient: float, inner: float = 1.0) -> int:
    """By trial of all, from above."""
    backward, _ = model_of(gradient, inner)
    return next(e for e in range(HIGHEST, LOWEST - 1, -1) if not backward(2.0**e).non_finite)


# Gradients that a scale brings into the range of normal float16 numbers: others are rounded beyond recognition.
GRADIENTS = st.floats(2.0**-20, 2.0**30, exclude_max=True)


@given(GRADIENTS, st.sampled_from([1.0, 3.0, 40.0]), st.integers(0, 24))
def test_it_finds_the_largest_power_of_two_that_is_finite(gradient, inner, start):
    backward, scales = model_of(gradient, inner)
    found = search(backward, start)
    assert found.exponent == largest_exponent(gradient, inner)
    assert found.scale == 2.0**found.exponent
    assert [2.0**exponent for exponent in found.tried] == scales
    assert found.verified == (found.exponent < HIGHEST)
    if found.verified:
        assert {found.exponent, found.exponent + 1} <= set(found.tried)


@given(st.floats(2.0**-14, 2.0**14))
def test_three_passes_do_where_nothing_is_hidden(gradient):
    # Between 65,504 and 65,520, which is rounded down, the prediction is one too low, and a fourth pass shows it.
    found = search(model_of(gradient)[0], 0)
    margin = abs(math.frexp(gradient)[0] - math.frexp(LARGEST)[0]) < 2e-3
    assert len(found.tried) <= (4 if margin else 3)
    assert found.largest_at_one == pytest.approx(gradient, rel=2**-10)


def test_a_prediction_that_was_too_low_is_mended():
    """Gradients need not be linear in the scale: what is rounded within a pass may be larger there."""

    def backward(scale: float) -> Pass:
        return Pass(scale * (4.0 if scale == 2.0**8 else 1.0), int(scale > LARGEST))

    found = search(backward, 8)
    assert (found.exponent, found.verified) == (15, True)


def test_what_is_larger_than_matters_is_not_verified():
    backward, scales = model_of(1e-3)
    found = search(backward, 16, matters_below=10)
    assert (found.exponent, found.verified, len(scales)) == (25, False, 1)
    assert search(backward, 16, matters_below=25).verified


def test_where_every_scale_overflows_and_where_no_gradient_is():
    found = search(lambda scale: Pass(0.0, 1), 16)
    assert (found.exponent, found.largest_at_one, found.tried[-1]) == (None, None, LOWEST)
    found = search(lambda scale: Pass(0.0, 0), 16)
    assert (found.exponent, found.largest_at_one, found.tried) == (None, 0.0, (16,))


def test_of_several_micro_batches_the_largest_gradient_counts_without_its_scale():
    from verl_fp16.preflight.activations import Gradients, Tally
    from verl_fp16.preflight.passes import Measured

    measured = Measured({}, {}, [])
    for scale, largest in ((2.0, 8.0), (4.0, 8.0)):
        measured.note(1, Gradients(scale, {"a": Tally(1, largest=largest)}, {"w": Tally(1, largest=2 * largest)}))
    assert (measured.largest_outputs, measured.largest_weights) == ({"a": 4.0}, {"w": 8.0})
