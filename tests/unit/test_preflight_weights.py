"""What preflight finds in a tensor, and what it makes of it: examination and verdict, without files."""

from __future__ import annotations

import math

import pytest
import torch

from verl_fp16.preflight.verdict import (
    AT_RISK,
    BF16_ROUNDING,
    FIT,
    FLUSHED_SHARE,
    LARGEST,
    ROOM,
    UNFIT,
    by_severity,
    judge,
)
from verl_fp16.preflight.weights import TensorReport, examine, one_thread
from verl_fp16.weight_cast import CastCounts

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def examined(tensor: torch.Tensor, pieces: int = 1) -> TensorReport:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return examine("w", tuple(tensor.shape), dtype, iter(tensor.tensor_split(pieces)))


def normal(std: float, size: int = 200_000) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)) * std


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", (1.0, 0.02, 1e-6, 1e-9, 1e-30))
def test_errors_are_those_of_a_cast_in_float64(dtype, std):
    tensor = normal(std, 20_000).to(DTYPES[dtype])
    report = examined(tensor, pieces=7)
    exact = tensor.double()
    for name, error in (("float16", report.fp16_error), ("bfloat16", report.bf16_error)):
        image = tensor.to(DTYPES[name]).double()
        norm = exact.norm()
        wanted = ((image - exact).norm() / norm).item() if norm else 0.0
        assert error == pytest.approx(wanted, rel=1e-5)
        assert error == 0.0 or dtype != name
    assert report.counts.values == 20_000
    assert report.dtype == dtype


def test_the_documented_figures_of_the_thresholds():
    """BF16's error on normally distributed weights, and what many flushed ones say of FP16's."""
    report = examined(normal(0.02))
    assert report.bf16_error == pytest.approx(BF16_ROUNDING, rel=0.02)
    assert report.bf16_error / report.fp16_error == pytest.approx(8, rel=0.02)
    small = examined(normal(2.4e-6))
    assert small.counts.flushed / small.counts.values == pytest.approx(FLUSHED_SHARE, rel=0.1)
    assert small.fp16_error / small.bf16_error == pytest.approx(4, rel=0.1)


def test_errors_leave_out_what_is_not_finite_before_or_after():
    tensor = torch.tensor([1 + 2.0**-11 + 2.0**-20, math.inf, math.nan, 1e6, -1e6, 0.0])
    report = examined(tensor)
    assert report.fp16_error == pytest.approx((2.0**-11 - 2.0**-20) / (1 + 2.0**-11), rel=1e-4)
    assert report.counts == CastCounts(6, overflow=2, non_finite=2, max_abs=1e6)
    assert examined(torch.tensor([math.nan])).fp16_error == 0.0
    assert examined(torch.tensor([math.nan], dtype=torch.float16)).bf16_error == 0.0


@pytest.mark.parametrize("tensor", (torch.zeros(10), torch.zeros(0), torch.tensor(2.0).view(1)))
def test_tensors_without_an_error(tensor):
    report = examined(tensor)
    assert (report.fp16_error, report.bf16_error) == (0.0, 0.0)


def test_one_thread_is_given_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def report(name: str = "w", fp16: float = 2e-4, bf16: float = 1.7e-3, **counts: float) -> TensorReport:
    return TensorReport(
        name, (10, 100), "float32", CastCounts(**{"values": 1000, "max_abs": 1.0, **counts}), fp16, bf16
    )


LIMIT = LARGEST / ROOM


@pytest.mark.parametrize(
    ("found", "verdict", "told"),
    (
        (report(), FIT, ()),
        (report(subnormal=900), FIT, ()),
        (report(max_abs=LIMIT), FIT, ()),
        (report(max_abs=LIMIT * 1.01), AT_RISK, ("above 4,094", "w (largest magnitude 4134.94)", "+precision=bf16")),
        (report(flushed=10), FIT, ()),
        (report(flushed=11), AT_RISK, ("more than 1%", "w (11 of 1,000, 1.1%)", "Fix: ")),
        # What BF16 holds exactly may be rounded by as much as BF16 would have done.
        (report(fp16=1.6e-3, bf16=0.0), FIT, ()),
        (report(fp16=1.8e-3, bf16=0.0), AT_RISK, ("rounded worse by FP16 than by BF16", "w (1.8e-03, BF16 1.7e-03)")),
        (report(fp16=1.8e-3, bf16=1.9e-3), FIT, ()),
        (report(overflow=1, max_abs=7e4), UNFIT, ("1 weight is beyond the range", "w (1 of 1,000, largest magnitude")),
        (report(non_finite=2), UNFIT, ("2 weights are inf or nan", "w (2 of 1,000)")),
    ),
)
def test_the_verdict_and_its_reasons(found, verdict, told):
    judged = judge([report("other"), found], None, ())
    assert judged.verdict == verdict
    assert judged.exit_code == {FIT: 0, AT_RISK: 1, UNFIT: 2}[verdict]
    assert bool(judged.reasons) == bool(told)
    if told:
        assert judged.reasons[0].verdict == verdict
    assert [text for text in told if text not in judged.reasons[0].why] == []


def test_an_architecture_that_vllm_refuses_is_unfit_whatever_its_weights():
    judged = judge([report()], "gemma3_text", {"gemma3_text"})
    assert judged.verdict == UNFIT
    assert "gemma3_text" in judged.reasons[0].why and "Fix: use +precision=bf16" in judged.reasons[0].why
    assert judge([report()], "qwen3", {"gemma3_text"}).verdict == FIT


def test_every_reason_is_told_the_worst_kind_first_and_the_worst_tensor_of_each():
    found = [report(f"large.{index}", max_abs=5000.0 + index) for index in range(8)]
    found.append(report("broken", non_finite=1, flushed=500))
    judged = judge(found, "glm4", {"glm4"})
    assert [reason.verdict for reason in judged.reasons] == [UNFIT, UNFIT, AT_RISK, AT_RISK]
    large = judged.reasons[2].why
    assert large.startswith("each of 8 tensors has weights above")
    assert large.index("large.7") < large.index("large.3")
    assert "large.2" not in large and "; and 3 more. Fix: " in large


def test_a_tensor_that_overflows_is_not_told_again_for_being_large():
    judged = judge([report(overflow=1, max_abs=7e4), report("large", max_abs=5000.0)], None, ())
    assert judged.reasons[1].why.startswith("1 tensor has weights above 4,094")
    assert "large (" in judged.reasons[1].why and "w (" not in judged.reasons[1].why


def test_the_worst_come_first():
    found = [
        report("fine"),
        report("large", max_abs=LIMIT * 3),
        report("flushed", flushed=20),
        report("coarse", fp16=1.0),
        report("overflowing", overflow=1, max_abs=7e4),
        report("nan", non_finite=5),
    ]
    ordered = [r.name for r in by_severity(found)]
    assert ordered == ["nan", "overflowing", "coarse", "large", "flushed", "fine"]
