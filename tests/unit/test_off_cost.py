"""The benchmark of what the package costs without the flag: its statistics and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def off_cost():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import off_cost
    finally:
        sys.path.pop(0)
    return off_cost


def test_a_cost_is_told_from_a_machine_that_slows_down(off_cost):
    """Every round is slower than the one before, and the hooks cost a tenth: the ratio of neighbours sees the tenth."""
    summary = off_cost.summary([(1.0 + 0.01 * i, 1.1 * (1.0 + 0.01 * i)) for i in range(40)])
    assert summary["ratio"] == pytest.approx(1.1)
    assert summary["ratio_of_noise"] == pytest.approx(1.0, abs=0.01)


def test_noise_is_of_the_side_without_alone(off_cost):
    summary = off_cost.summary([(1.0, 5.0), (2.0, 7.0), (2.0, 6.0), (1.0, 5.0)])
    assert summary["ratio_of_noise"] == pytest.approx(2.0), "2/1, and swapped 2/1"


def test_the_table_shows_the_committed_results(off_cost, capsys):
    result = json.loads((BENCHMARKS / "results" / "off-cost-cpu.json").read_text())
    off_cost.print_table(result)
    shown = capsys.readouterr().out
    for name in ("import verl", "training step"):
        assert name in shown
        assert f"{result[name]['ratio']:.4f}" in shown
