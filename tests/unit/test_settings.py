"""Settings: wrong input gets one message that names the key and the fix."""

from __future__ import annotations

import pytest

from verl_fp16.settings import LossScaleSettings, Settings, SettingsError


@pytest.mark.parametrize(
    ("node", "message"),
    (
        ({"train_dtyp": "float16"}, "did you mean verl_fp16.train_dtype?"),
        ({"train_dtype": "fp17"}, "verl_fp16.train_dtype must be one of float16, bfloat16, float32, got 'fp17'"),
        ({"loss_scale": {"grow_interval": 3}}, "did you mean verl_fp16.loss_scale.growth_interval?"),
        ({"loss_scale": {"xyz": 3}}, "known keys: init"),
        ({"loss_scale": 3}, "verl_fp16.loss_scale must be a mapping, got 3"),
        ({"critic_loss_scale": {"init": -1.0}}, "verl_fp16.critic_loss_scale.init must be at least"),
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
    ),
)
def test_loss_scale_out_of_range_names_its_key(name, value):
    with pytest.raises(SettingsError, match=f"loss_scale.{name}"):
        LossScaleSettings(**{name: value})


def test_defaults_are_the_papers():
    assert LossScaleSettings() == LossScaleSettings(65536.0, 2.0, 0.5, 400, 1.0)


def test_the_critic_follows_the_actor_key_by_key():
    settings = Settings.from_node({"loss_scale": {"init": 8.0, "min": 2.0}, "critic_loss_scale": {"min": 4.0}})
    assert settings.critic_loss_scale == LossScaleSettings(init=8.0, min=4.0)
