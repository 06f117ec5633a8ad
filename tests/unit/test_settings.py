"""Settings: wrong input gets one message that names the key and the fix."""

from __future__ import annotations

import pytest

from verl_fp16.settings import LossScaleSettings, MismatchSettings, Settings, SettingsError


@pytest.mark.parametrize(
    ("node", "message"),
    (
        ({"train_dtyp": "float16"}, "did you mean verl_fp16.train_dtype?"),
        ({"train_dtype": "fp17"}, "verl_fp16.train_dtype must be one of float16, bfloat16, float32, got 'fp17'"),
        ({"loss_scale": {"grow_interval": 3}}, "did you mean verl_fp16.loss_scale.growth_interval?"),
        ({"loss_scale": {"xyz": 3}}, "known keys: init"),
        ({"loss_scale": 3}, "verl_fp16.loss_scale must be a mapping, got 3"),
        ({"critic_loss_scale": {"init": -1.0}}, "verl_fp16.critic_loss_scale.init must be at least"),
        ({"sync": 3}, "verl_fp16.sync must be a mapping, got 3"),
        ({"sync": {"audit_intervall": 3}}, "did you mean verl_fp16.sync.audit_interval?"),
        ({"sync": {"on_overflow": "clip"}}, "verl_fp16.sync.on_overflow must be error or clamp or ignore, got 'clip'"),
        ({"sync": {"audit_interval": -1}}, "verl_fp16.sync.audit_interval must be a number of syncs, or 0"),
        ({"sync": {"audit_interval": 2.5}}, "verl_fp16.sync.audit_interval must be a number of syncs, or 0"),
        ({"sync": {"probe_tolerance": 0}}, "verl_fp16.sync.probe_tolerance must be a finite number of nats above 0"),
        ({"sync": {"probe_tolerance": float("inf")}}, "verl_fp16.sync.probe_tolerance must be a finite number"),
        ({"mismatch": 3}, "verl_fp16.mismatch must be a mapping, got 3"),
        ({"mismatch": {"alarm_k3_grow": 3}}, "did you mean verl_fp16.mismatch.alarm_k3_growth?"),
        ({"mismatch": {"on_alarm": "halt"}}, "mismatch.on_alarm must be warn or checkpoint or stop, got 'halt'"),
        (
            {"mismatch": {"evidence_interval": -1}},
            "mismatch.evidence_interval must be a number of training steps, or 0",
        ),
        ({"mismatch": {"alarm_window": 9}}, "mismatch.alarm_window must be a number of training steps, 10 or more"),
        ({"mismatch": {"alarm_slope": 0}}, "mismatch.alarm_slope must be a finite number of nats above 0, or null"),
        ({"mismatch": {"alarm_k3_growth": 1}}, "mismatch.alarm_k3_growth must be a finite factor above 1, or null"),
        ({"mismatch": {"alarm_prob_diff": 2}}, "mismatch.alarm_prob_diff must be above 0 and at most 1, or null"),
        ({"mismatch": {"alarm_run_tokens": 1}}, "mismatch.alarm_run_tokens must be a number of tokens, 2 or more, or"),
    ),
)
def test_wrong_node_is_refused_by_name(node, message):
    with pytest.raises(SettingsError) as caught:
        Settings.from_node(node)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("init", float("nan")),
        ("init", 1e39),
        ("min", 1e-40),
        ("init", "big"),
        ("init", True),
        ("init", 0.5),
        ("growth_factor", 1.0),
        ("growth_factor", 1e300),
        ("backoff_factor", 1.0),
        ("backoff_factor", 0.0),
        ("growth_interval", 0),
        ("growth_interval", 2.5),
        ("min", 0.0),
        ("max", 0.5),
        ("max", 1e39),
        ("max", "none"),
        ("mode", "dynamical"),
        ("max_consecutive_skips", 0),
        ("max_consecutive_skips", 1.5),
        ("hold_lr_on_skip", 1),
        ("trace_modules", "yes"),
    ),
)
def test_loss_scale_out_of_range_names_its_key(name, value):
    with pytest.raises(SettingsError, match=f"loss_scale.{name}"):
        LossScaleSettings(**{name: value})


def test_the_first_scale_lies_below_the_ceiling():
    with pytest.raises(SettingsError, match=r"loss_scale.init must be at most loss_scale.max \(1024.0\)"):
        LossScaleSettings(max=1024.0)


def test_a_static_scale_needs_no_bounds():
    assert LossScaleSettings(mode="static", init=0.25).init == 0.25
    with pytest.raises(SettingsError, match="loss_scale.init must be at least"):
        LossScaleSettings(mode="static", init=0.0)


def test_defaults_are_the_papers():
    assert LossScaleSettings() == LossScaleSettings(65536.0, 2.0, 0.5, 400, 1.0, None, "dynamic")
    assert LossScaleSettings().hold_lr_on_skip is True


FAULT = {"target": "gradient", "parameter": "lm_head.weight", "updates": [1]}


@pytest.mark.parametrize(
    ("faults", "message"),
    (
        ({"target": "loss"}, "verl_fp16.fault_injection must be a list of faults"),
        (["loss"], "verl_fp16.fault_injection[0] must be a mapping with target, updates"),
        ([{**FAULT, "ranks": 1}], "verl_fp16.fault_injection[0].ranks is no key of a fault: did you mean rank?"),
        ([FAULT, {**FAULT, "target": "weight"}], "verl_fp16.fault_injection[1].target must be gradient or loss"),
        ([{**FAULT, "role": "ref"}], "fault_injection[0].role must be actor or critic"),
        ([{**FAULT, "value": 3}], "fault_injection[0].value must be inf or -inf or nan"),
        ([{**FAULT, "updates": 3}], "fault_injection[0].updates must be a list of updates, counted from 1, got 3"),
        ([{**FAULT, "updates": [0]}], "fault_injection[0].updates must be a list"),
        ([{**FAULT, "updates": []}], "fault_injection[0].updates must be a list"),
        ([{**FAULT, "rank": -1}], "fault_injection[0].rank must be a rank"),
        ([{**FAULT, "parameter": ""}], "fault_injection[0].parameter must name a parameter for the target gradient"),
        ([{**FAULT, "target": "loss"}], "fault_injection[0].parameter must name a parameter for the target gradient"),
    ),
)
def test_a_wrong_fault_is_refused_by_its_place(faults, message):
    with pytest.raises(SettingsError) as caught:
        Settings.from_node({"fault_injection": faults})
    assert message in str(caught.value)


def test_a_fault_strikes_on_its_rank_in_its_updates():
    (fault,) = Settings.from_node({"fault_injection": [{**FAULT, "rank": 1, "updates": [2, 5]}]}).fault_injection
    assert [update for update in range(1, 7) if fault.strikes(1, update)] == [2, 5]
    assert not fault.strikes(0, 2)


@pytest.mark.parametrize("value", ("inf", "-inf", "nan"))
def test_a_value_that_yaml_makes_a_number_of_is_the_word(value):
    for given in (value, float(value)):
        (fault,) = Settings.from_node({"fault_injection": [{**FAULT, "value": given}]}).fault_injection
        assert fault.value == value


def test_the_critic_follows_the_actor_key_by_key():
    settings = Settings.from_node({"loss_scale": {"init": 8.0, "min": 2.0}, "critic_loss_scale": {"min": 4.0}})
    assert settings.critic_loss_scale == LossScaleSettings(init=8.0, min=4.0)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    (
        ("on_alarm", ("", None, True, ["warn"]), ("warn", "checkpoint", "stop")),
        ("evidence_interval", (-1, 2.0, True, None, "all"), (0, 1)),
        ("evidence_tokens", (0, 2.0, True, None), (1,)),
        ("evidence_sequences", (0, 2.0, True, None), (1,)),
        ("evidence_keep", (0, 2.0, True, None), (1,)),
        ("alarm_prob_diff", (0, -0.5, 1.01, NAN, True, "0.9"), (1, 1e-9, None)),
        ("alarm_k3_jump", (1, 0.5, INF, NAN, True, "3"), (1.01, 2, None)),
        ("alarm_k3_growth", (1, 0.5, INF, NAN, True, "10"), (1.01, 2, None)),
        ("alarm_window", (9, 10.0, True, None), (10,)),
        ("alarm_slope", (0, -0.5, INF, NAN, True, "1"), (1e-9, 2, None)),
        ("alarm_nonfinite", (0, 1.0, True, "1"), (1, 2, None)),
        ("alarm_run_tokens", (1, 64.0, True, "64"), (2, None)),
        ("alarm_run_share", (0, 1.01, NAN, True, "1%"), (1, 1e-9, None)),
    ),
)
def test_settings_of_the_gap_have_their_bounds(name, wrong, right):
    for value in wrong:
        with pytest.raises(SettingsError, match=f"mismatch.{name} must be .*, got "):
            MismatchSettings(**{name: value})
    for value in right:
        assert getattr(Settings.from_node({"mismatch": {name: value}}).mismatch, name) == value


def test_every_setting_of_the_gap_is_checked():
    """A field without a check takes any value."""
    with pytest.raises(SettingsError) as caught:
        MismatchSettings(**dict.fromkeys(vars(MismatchSettings()), "wrong"))
    assert all(f"mismatch.{name} must be" in str(caught.value) for name in vars(MismatchSettings()))


def test_a_wrong_setting_of_the_gap_comes_with_its_default():
    with pytest.raises(SettingsError) as caught:
        Settings.from_node({"mismatch": {"alarm_k3_growth": 0.5}})
    assert [finding.fix for finding in caught.value.findings] == [("verl_fp16.mismatch.alarm_k3_growth=10.0",)]
