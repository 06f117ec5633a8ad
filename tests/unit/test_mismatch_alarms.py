"""Alarms of the gap: none in calm runs nor of one outlier; each fault within three steps, told once while it lasts."""

from __future__ import annotations

import math
import random

import pytest

from verl_fp16.mismatch.alarm_rules import K3_FLOOR, PREFIXES
from verl_fp16.mismatch.alarms import QUIET_STEPS, Alarms
from verl_fp16.mismatch.definitions import STATISTICS
from verl_fp16.mismatch_settings import MismatchSettings

PREFIX = PREFIXES[0]
LASTING = MismatchSettings().alarm_window
# Whatever the rest is measured on.
OF_THE_BATCH = ("repeating_rows_share",)


def calm(seed: int = 0, level: float = 3e-6, sigma: float = 0.5, tokens: int = 512 * 1200):
    """Steps of a run without a fault: k3 around ``level``, everything else as small batches have it."""
    noise = random.Random(seed)
    while True:
        error = noise.lognormvariate(0, 0.5) * math.sqrt(level / 1e-5)
        yield {
            "k3": level * noise.lognormvariate(0, sigma),
            "prob_diff_max": min(1.0, 0.02 * noise.lognormvariate(0, 0.8)),
            "prob_diff_min": -min(1.0, 0.02 * noise.lognormvariate(0, 0.8)),
            "slope_per_1k_tokens": -0.07 + 1.5 * error * noise.gauss(0, 1),
            "slope_per_1k_tokens_se": error,
            "tokens": float(tokens),
            "sequences": 512.0,
            "empty_rows": 0.0,
            "nonfinite_rollout": 0.0,
            "nonfinite_training": 0.0,
            "repeating_rows_share": float(noise.random() < 0.2) * 4 / 512,
        }


def run(steps, settings: MismatchSettings | None = None, prefix: str = PREFIX):
    """(step, alarm) of each alarm; steps count from 1."""
    alarms = Alarms(settings or MismatchSettings())
    logged = (
        {"actor/loss": 0.5, **{(PREFIX if name in OF_THE_BATCH else prefix) + name: step[name] for name in step}}
        for step in steps
    )
    return [(number, alarm) for number, step in enumerate(logged, 1) for alarm in alarms.judge(number, step)]


def told(found):
    return [(number, alarm.rule) for number, alarm in found]


def faulty(clean: int, fault: dict[str, float], lasting: int, then: int = 0, **calm_run):
    """Clean steps, steps with the fault, clean steps."""
    steps = calm(**calm_run)
    yield from (next(steps) for _ in range(clean))
    yield from ({**next(steps), **fault} for _ in range(lasting))
    yield from (next(steps) for _ in range(then))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "kind",
    (
        {"level": 3e-6},
        {"level": 1e-4, "sigma": 0.6},
        {"level": 1e-3},  # BF16's level: steady, it is no growth
        {"level": 1e-7, "sigma": 1.0},
        {"level": 1e-6, "tokens": 512 * 4},
    ),
    ids=lambda kind: "-".join(f"{name}={value:g}" for name, value in kind.items()),
)
def test_calm_runs_have_no_alarm(seed, kind):
    steps = calm(seed, **kind)
    assert run(next(steps) for _ in range(1000)) == []


NO_JUMP = MismatchSettings(alarm_k3_jump=None)
K3 = {"k3": 3e-4}  # a hundred times the calm level: BF16 against FP16
FAULTS = {
    "k3_jump": (K3, f"{PREFIX}k3", "of the newest 3"),
    "prob_diff": ({"prob_diff_min": -0.97}, f"{PREFIX}prob_diff_min", "0.9 or more in 3 of the last 5 steps"),
    "slope": (
        {"slope_per_1k_tokens": -1.01, "slope_per_1k_tokens_se": 0.1},
        f"{PREFIX}slope_per_1k_tokens",
        "standard error 0.1; beyond 0.5 nats",
    ),
    "nonfinite": ({"nonfinite_rollout": 1.0}, f"{PREFIX}nonfinite_rollout", "1 token, beside 614,400 that are finite"),
    "run_share": ({"repeating_rows_share": 8 / 512}, f"{PREFIX}repeating_rows_share", "one token 64 times in a row"),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("clean", (5, 17, 300))
@pytest.mark.parametrize("rule", FAULTS)
def test_each_fault_is_told_once_within_three_steps(rule, clean, prefix):
    fault, metric, trend = FAULTS[rule]
    found = run(faulty(clean, fault, LASTING), prefix=prefix)
    assert told(found) == [(found[0][0], rule)], "once in the window"
    ((number, alarm),) = found
    assert clean < number <= clean + 3
    assert alarm.metric == (metric if metric.endswith(OF_THE_BATCH) else metric.replace(PREFIX, prefix))
    assert alarm.value == next(iter(fault.values()))
    line = alarm.line(number)
    assert line.startswith(f"step {number}: {alarm.metric} is {alarm.value:.3g} (") and "\n" not in line
    assert trend in line and f"verl_fp16.mismatch.alarm_{rule})" in line
    assert line.endswith(f"What to do: {alarm.advice}") and len(alarm.advice) > 50


@pytest.mark.parametrize("sigma", (0.0, 0.5))
@pytest.mark.parametrize("seed", range(5))
def test_k3_grows_at_once_in_noise_too(seed, sigma):
    noise = random.Random(seed)
    steps = list(faulty(20, {}, 3, sigma=sigma))
    for step in steps[20:]:
        step["k3"] = 3e-4 * noise.lognormvariate(0, sigma)
    ((number, alarm),) = run(steps)
    assert alarm.rule == "k3_jump" and 20 < number <= 23


@pytest.mark.parametrize("rule", sorted(FAULTS.keys() - {"nonfinite"}))
def test_one_outlier_is_no_alarm(rule):
    fault = FAULTS[rule][0]
    outliers = [step for _ in range(20) for step in faulty(6, {**fault, "k3": 1.0}, 1, 6)]
    assert run(outliers) == []


def test_a_token_that_is_not_finite_is_no_outlier():
    assert told(run(faulty(0, {"nonfinite_training": 3.0}, 1, 50))) == [(1, "nonfinite")]


@pytest.mark.parametrize("steps", (15, 40, 80))
def test_slow_growth_is_told_within_the_window(steps):
    """20 times in so many steps; no step is out of the ordinary."""
    clean = list(faulty(60, {}, steps + 20, sigma=0.3))
    for index, step in enumerate(clean[60:]):
        step["k3"] *= 20 ** min(1.0, index / steps)
    found = run(clean, NO_JUMP)
    assert [rule for _, rule in told(found)] == ["k3_growth"]
    assert 60 < found[0][0] <= 60 + steps + 20


def test_a_level_is_told_as_growth_once_only():
    """After a window at the new level, that is what steps are held against."""
    assert len(run(faulty(30, K3, 1000))) == 1


def test_growth_that_was_told_as_a_jump_is_no_news_and_the_other_way_round():
    """The step that is ten times the level is a jump at once, and growth as long as the window remembers."""
    assert told(run(faulty(30, K3, LASTING - 1))) == [(33, "k3_jump")]
    assert told(run(faulty(30, K3, LASTING - 1), NO_JUMP)) == [(33, "k3_growth")]


def as_on_a_cpu(clean, factor, sigma=0.15, seed=0):
    """k3 of short FP16 runs on a CPU, and what a fault makes of it."""
    noise = random.Random(seed)
    return [{"k3": 1.7e-6 * noise.lognormvariate(0, sigma) * (factor if step >= clean else 1)} for step in range(60)]


@pytest.mark.parametrize("seed", range(10))
def test_outliers_are_no_jump(seed):
    noise = random.Random(seed)
    steps = [{"k3": 1e-5 * noise.lognormvariate(0, 0.3) * (20 if noise.random() < 0.03 else 1)} for _ in range(300)]
    assert run(steps) == []


def test_values_that_are_no_numbers_are_passed_over():
    assert run([{"k3": "1e-3", "slope_per_1k_tokens": [1], "nonfinite_rollout": None}] * 20) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_jump_is_beyond_what_k3_varies_by(seed):
    assert 10 < run(as_on_a_cpu(10, 6.0, seed=seed))[0][0] <= 13
    assert run(as_on_a_cpu(10, 2.0, seed=seed)) == []
    wide = as_on_a_cpu(30, 1.5, sigma=0.6, seed=seed)
    assert run(wide, MismatchSettings(alarm_k3_jump=1.5, alarm_k3_growth=None)) == [], "no more than ordinary here"


def test_a_jump_needs_four_steps_before_the_newest_three():
    steps = [{"k3": 2e-6}] * 5 + [{"k3": 1e-4}] * 5
    assert told(run(steps)) == [(8, "k3_jump")]
    assert told(run(steps[3:])) == []


@pytest.mark.parametrize("before", (0.0, 1e-12, 1e-8))
def test_growth_is_counted_from_the_floor(before):
    limit = MismatchSettings().alarm_k3_growth * K3_FLOOR
    steps = [{"k3": before}] * 10
    assert run([*steps, *[{"k3": limit}] * 10], NO_JUMP) == []
    ((number, alarm),) = run([*steps, *[{"k3": limit * 1.001}] * 10], NO_JUMP)
    assert number == 13 and alarm.trend == f"{before:.2g} -> 1e-05 over 12 steps"
    assert run([{"k3": before}, {"k3": 0.0}] * 50) == []


def test_growth_needs_steps_to_compare_with():
    rising = [{"k3": 1e-5 * 100**step} for step in range(20)]
    assert [number for number, _ in run(rising, NO_JUMP)] == [7]
    assert run([{"k3": 0.0}] * 2 + [{"k3": 1.0}] * 200) == [], "two clean steps are no level"


def test_steps_without_a_metric_do_not_count():
    """Neither do numbers that are not finite. What is left is judged as if it came step after step."""
    for hole in ({}, {"tokens": 0.0}, {"k3": math.nan, "prob_diff_min": -math.inf, "slope_per_1k_tokens": -0.5}):
        for rule in ("k3_jump", "prob_diff", "slope", "run_share"):
            steps = list(faulty(7, FAULTS[rule][0], 3))
            holes = [part for step in steps for part in (step, hole)]
            assert [rule for _, rule in told(run(holes))] == [rule]
    assert run([{}] * 20) == []


@pytest.mark.parametrize("other", ("repeating_rows_share", "slope_per_1k_tokens_se"))
def test_half_of_what_a_rule_needs_is_no_alarm(other):
    fault = {name: value for _, values in FAULTS.items() for name, value in values[0].items()}
    wanted = {"repeating_rows_share": "run_share", "slope_per_1k_tokens_se": "slope"}[other]
    steps = list(faulty(7, fault, 5))
    for step in steps:
        del step[other]
    assert {rule for _, rule in told(run(steps))} == FAULTS.keys() - {wanted}


TURNED_OFF_BY = {
    **{rule: [(f"alarm_{rule}",)] for rule in FAULTS},
    "run_share": [("alarm_run_share",), ("alarm_run_tokens",)],
    "k3_jump": [("alarm_k3_jump", "alarm_k3_growth")],
}


@pytest.mark.parametrize("rule", FAULTS)
def test_a_rule_can_be_turned_off(rule):
    fault = {name: value for _, values in FAULTS.items() for name, value in values[0].items()}
    for names in TURNED_OFF_BY[rule]:
        found = run(faulty(7, fault, 5), MismatchSettings(**dict.fromkeys(names)))
        assert {rule for _, rule in told(found)} == FAULTS.keys() - {rule}


def test_every_optional_setting_turns_a_rule_off():
    optional = {name for name in vars(MismatchSettings()) if name.startswith("alarm_")} - {"alarm_window"}
    assert {name for ways in TURNED_OFF_BY.values() for names in ways for name in names} == optional


@pytest.mark.parametrize(
    ("setting", "limit", "at", "beyond"),
    (
        ("alarm_prob_diff", 1.0, {"prob_diff_max": 0.9999}, {"prob_diff_max": 1.0}),
        ("alarm_prob_diff", 0.5, {"prob_diff_min": -0.4999}, {"prob_diff_min": -0.5}),
        ("alarm_k3_jump", 40.0, {"k3": 4e-4}, {"k3": 4.001e-4}),
        ("alarm_slope", 2.0, {"slope_per_1k_tokens": 2.0}, {"slope_per_1k_tokens": 2.001}),
        ("alarm_nonfinite", 3, {"nonfinite_training": 2.0}, {"nonfinite_training": 3.0}),
        ("alarm_run_share", 0.25, {"repeating_rows_share": 0.2499}, {"repeating_rows_share": 0.25}),
    ),
)
def test_the_limits_are_the_settings(setting, limit, at, beyond):
    calm = {"k3": 1e-5, "slope_per_1k_tokens_se": 0.1, "sequences": 16.0, "empty_rows": 4.0}
    settings = MismatchSettings(**{"alarm_k3_growth": None, setting: limit})
    assert run([calm] * 7 + [{**calm, **at}] * 5, settings) == []
    ((_, alarm),) = run([calm] * 7 + [{**calm, **beyond}] * 5, settings)
    assert setting == f"alarm_{alarm.rule}"


SLOPE = {"slope_per_1k_tokens": -3.0, "slope_per_1k_tokens_se": 0.1, "sequences": 64.0, "tokens": 64.0 * 500}


@pytest.mark.parametrize(
    ("change", "told_of"),
    (
        ({}, True),
        ({"slope_per_1k_tokens": 3.0}, True),
        ({"slope_per_1k_tokens_se": 0.0}, True),
        ({"slope_per_1k_tokens_se": 0.59}, True),
        ({"slope_per_1k_tokens_se": 0.61}, False),
        ({"sequences": 16.0}, True),
        ({"sequences": 15.0}, False),
        ({"tokens": 6400.0}, True),
        ({"tokens": 6399.0}, False),
    ),
)
def test_a_slope_is_judged_where_it_means_something(change, told_of):
    assert bool(run([{**SLOPE, **change}] * 3)) is told_of
    assert run([{**SLOPE, **change}] * 2) == []


def test_a_slope_that_changes_its_sign_is_noise():
    flipped = {**SLOPE, "slope_per_1k_tokens": 3.0}
    assert run([SLOPE, SLOPE, flipped] * 10) == []


def test_the_extreme_that_is_told_is_the_larger_one_with_its_sign():
    ((_, alarm),) = run([{"prob_diff_max": 0.95, "prob_diff_min": -0.96}] * 3)
    assert (alarm.metric, alarm.value) == ("mismatch/prob_diff_min", -0.96)
    once_more = [{"prob_diff_max": value} for value in (1.0, 0.1, 0.1, 1.0, 0.1, 0.1, 1.0, 0.1, 1.0)]
    assert [number for number, _ in run(once_more)] == [], "2 of any 5 but the last, which are 3 of 6"
    assert [number for number, _ in run([*once_more, {"prob_diff_max": 1.0}])] == [10]
    ((_, alarm),) = run([{"prob_diff_max": 1.0}] * 3)
    assert (alarm.metric, alarm.value) == ("mismatch/prob_diff_max", 1.0)


@pytest.mark.parametrize(("rule", "needed"), (("prob_diff", 3), ("run_share", 2)))
def test_what_is_told_again_is_told_of_a_step_that_has_it(rule, needed):
    """A line about a value that is ordinary helps nobody."""
    fault, calm = FAULTS[rule][0], {"prob_diff_min": -0.1, "repeating_rows_share": 0.0}
    steps = [*[fault] * (needed + 9), calm, fault]
    assert told(run(steps, MismatchSettings(alarm_window=10))) == [(needed, rule), (needed + 11, rule)]


def test_one_response_that_repeats_itself_is_no_fault_of_a_small_batch():
    steps = [{"repeating_rows_share": float(step % 3 == 0) / 16} for step in range(60)]
    assert run(steps) == []


def test_a_fault_that_lasts_is_told_again_after_the_window():
    settings = MismatchSettings(alarm_window=30)
    found = run([{"nonfinite_rollout": 1.0}] * 100, settings)
    assert told(found) == [(step, "nonfinite") for step in (1, 31, 61, 91)]


def test_a_rule_is_armed_again_after_quiet_steps():
    fault, quiet = [{"nonfinite_rollout": 1.0}], [{"nonfinite_rollout": 0.0}]
    almost = fault + quiet * (QUIET_STEPS - 1)
    assert told(run(almost * 5)) == [(1, "nonfinite")], "a fault that flickers is one that lasts"
    assert told(run((almost + quiet) * 3)) == [(step, "nonfinite") for step in (1, 12, 23)]
    missing = fault + [{}] * QUIET_STEPS
    assert told(run(missing * 3)) == [(1, "nonfinite")], "a step that does not say is not quiet"


def test_both_sides_are_faults_of_their_own():
    one, both = {"nonfinite_rollout": 2.0, "tokens": 9.0}, {"nonfinite_rollout": 2.0, "nonfinite_training": 1.0}
    found = run([one, one, both])
    assert [(number, alarm.metric) for number, alarm in found] == [
        (1, "mismatch/nonfinite_rollout"),
        (3, "mismatch/nonfinite_training"),
    ]
    assert [alarm.trend for _, alarm in found] == ["2 tokens, beside 9 that are finite on both sides", "1 token"]
    assert "preflight" in found[0][1].advice and "trace_modules" in found[1][1].advice


def test_the_gap_of_the_first_mini_batch_has_a_prefix_of_its_own():
    assert PREFIXES == ("mismatch/", "mismatch_first_update/")


def test_the_metrics_are_those_that_the_statistics_have():
    names = {statistic.name for statistic in STATISTICS} | {"repeating_rows_share"}
    assert {metric.removeprefix(PREFIX) for _, metric, _ in FAULTS.values()} <= names
    assert set(next(calm())) <= names


def test_what_is_remembered_is_bounded():
    alarms = Alarms(MismatchSettings(alarm_window=10))
    steps = calm()
    for number in range(1, 500):
        alarms.judge(number, {PREFIX + name: value for name, value in next(steps).items()})
    parts = [part for rule in alarms._rules for part in (rule, *getattr(rule, "_parts", ()))]
    kept = [value for part in parts for name, value in vars(part).items() if name != "_parts"]
    assert sorted(len(value) for value in kept if hasattr(value, "append")) == [3, 3, 5, 10, 23] and not alarms._told
