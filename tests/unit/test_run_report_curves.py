"""Which metric a panel takes, what is best, and what thinning and smoothing keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import entry, loaded, write_log

from verl_fp16.run_report.curves import PANELS, Course, courses, is_wanted, typeset, written
from verl_fp16.run_report.reading import Series, read_log
from verl_fp16.run_report.thinning import default_window, running_median, thin

PANEL = {panel.key: panel for panel in PANELS}


def taken(tmp_path, *steps: dict[str, float]) -> dict[str, Course]:
    path = tmp_path / "run.jsonl"
    path.write_text("".join(entry(step, data) for step, data in enumerate(steps)))
    return courses(read_log(path, is_wanted()))


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("reward", ("critic/score/mean", "critic/rewards/mean")),
        ("gap_mean", ("mismatch/log_prob_abs_diff_mean", "mismatch_first_update/log_prob_abs_diff_mean")),
        ("k3", ("mismatch/k3", "mismatch_first_update/k3")),
        (
            "prob_diff",
            (
                "mismatch/prob_abs_diff_mean",
                "mismatch_first_update/prob_abs_diff_mean",
                "training/rollout_probs_diff_mean",
            ),
        ),
        ("step_time", ("timing_s/step", "perf/time_per_step")),
    ],
)
def test_a_panel_takes_the_first_of_its_names_that_is_logged(tmp_path, key, names):
    for first in range(len(names)):
        course = taken(tmp_path, {name: float(number) for number, name in enumerate(names) if number >= first})[key]
        assert (course.metric, course.series.values.tolist()) == (names[first], [first])


def test_validation_is_the_mean_over_data_sources_at_each_step(tmp_path):
    course = taken(
        tmp_path,
        {
            "val-core/a/acc/mean@1": 0.2,
            "val-core/b/c/acc/mean@8": 0.4,
            "val-core/a/reward/mean@1": 9,
            "val-core/a/acc/best@8/mean": 9,
        },
        {"critic/score/mean": 1.0},
        {"val-core/a/acc/mean@1": 0.5, "val-aux/a/acc/mean@1": 9},
    )["validation"]
    assert course.metric == "val-core/*/acc/mean@N"
    assert course.series.steps.tolist() == [0, 2]
    assert course.series.values.tolist() == pytest.approx([0.3, 0.5], abs=1e-15)


def test_validation_without_accuracies_is_of_rewards(tmp_path):
    course = taken(tmp_path, {"val-core/a/reward/mean@4": -2.5})["validation"]
    assert (course.metric, course.series.values.tolist()) == ("val-core/*/reward/mean@N", [-2.5])


def test_the_number_of_data_sources_that_are_kept_is_bounded(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(entry(0, {f"val-core/{number}/acc/mean@1": 1.0 for number in range(500)}))
    assert len(read_log(path, is_wanted()).series) == 64


def test_nothing_else_of_a_log_is_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(entry(1, {"critic/score/max": 1, "val-aux/x/acc/mean@1": 1, "mismatch/k1": 1, "actor/entropy": 1}))
    assert set(read_log(path, is_wanted()).series) == {"actor/entropy"}


@pytest.mark.parametrize(
    ("key", "expected"), [("reward", (2, 5.0)), ("k3", (4, -7.0)), ("slope", (1, 1.0)), ("entropy", None)]
)
def test_what_is_best(key, expected):
    course = Course(PANEL[key], "", Series(np.arange(6), np.array([math.nan, 1, 5, 5, -7, math.inf])))
    best = course.best()
    assert (best and (best.step, best.value)) == expected
    assert (course.first().step, course.last().step) == (1, 4)


def test_of_a_metric_that_was_never_finite_nothing_is_first():
    course = Course(PANEL["reward"], "", Series(np.arange(2), np.array([math.nan, math.inf])))
    assert (course.first(), course.last(), course.best()) == (None, None, None)


@pytest.mark.parametrize(
    ("value", "form", "ascii_", "set_"),
    [
        (3.1e-4, ".3e", "3.100e-04", "3.100e−4"),
        (-1.5e12, ".3e", "-1.500e+12", "−1.500e12"),
        (0.0, ".3e", "0.000e+00", "0.000e0"),
        (65536.0, ",.10g", "65,536", "65,536"),
        (-0.07, ",.3f", "-0.070", "−0.070"),
        (math.nan, ".3e", "nan", "nan"),
        (-math.inf, ",.0f", "-inf", "−inf"),
    ],
)
def test_numbers(value, form, ascii_, set_):
    assert (written(value, form), typeset(written(value, form))) == (ascii_, set_)


series = st.lists(st.one_of(st.floats(-1e9, 1e9), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=400).map(
    np.array
)


@settings(max_examples=100, deadline=None)
@given(series, st.integers(1, 20))
def test_thinning_keeps_the_extremes_and_the_order_and_adds_nothing(values, buckets):
    steps = np.cumsum(np.arange(len(values)) % 3 + 1)
    kept_steps, kept = thin(steps, values, buckets, float(steps[0]), float(steps[-1]))
    assert (np.diff(kept_steps) > 0).all()
    assert len(kept) <= max(2 * buckets, len(values) if len(values) <= 2 * buckets else 0)
    assert not np.isinf(kept).any()
    finite = values[np.isfinite(values)]
    if len(finite):
        assert (np.nanmin(kept), np.nanmax(kept)) == (finite.min(), finite.max())
    shown = dict(zip(steps.tolist(), np.where(np.isfinite(values), values, np.nan).tolist(), strict=True))
    assert all(
        shown[step] == value or math.isnan(value)
        for step, value in zip(kept_steps.tolist(), kept.tolist(), strict=True)
    )


def test_a_spike_of_one_step_in_a_hundred_thousand_is_shown():
    values = np.zeros(100_000)
    values[54_321] = 1.0
    steps, kept = thin(np.arange(100_000), values, 360, 0, 99_999)
    assert len(kept) <= 720
    assert steps[kept.argmax()] == 54_321 and kept.max() == 1.0


@settings(max_examples=100, deadline=None)
@given(series, st.integers(1, 31))
def test_the_running_median_is_that_of_the_window_around_each_point(values, window):
    window |= 1
    steps = np.arange(len(values)) * 10
    of_steps, medians = running_median(steps, values, window, most=10**6)
    finite = values[np.isfinite(values)]
    assert of_steps.tolist() == steps[np.isfinite(values)].tolist()
    half = window // 2
    expected = [np.median(finite[max(0, at - half) : at + half + 1]) for at in range(len(finite))]
    assert medians.tolist() == expected


def test_the_running_median_of_many_points_is_taken_at_few_of_them():
    steps, medians = running_median(np.arange(10_000), np.arange(10_000.0), 101)
    assert len(steps) == 200 and (steps[0], steps[-1]) == (0, 9999)
    assert (medians[50:150] == steps[50:150]).all()


@pytest.mark.parametrize(("points", "window"), [(1, 1), (60, 1), (61, 5), (1000, 41), (100_000, 4001)])
def test_the_window_goes_by_the_length_of_the_run(points, window):
    assert default_window(points) == window


def test_what_a_run_says_of_itself(tmp_path):
    path = write_log(tmp_path / "one" / "metrics.jsonl", range(1, 5), skipped_total=lambda step: float(step // 2))
    run = loaded(path)
    assert (run.name, run.span, run.seconds) == ("one", (1, 4), 40.0)
    assert run.dtypes == {"training": "float16", "rollout": "float16"}
    assert run.skips == {"actor": 2}
