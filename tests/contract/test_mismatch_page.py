"""docs/mismatch.md is what the code does, and what alarms advise can be pasted."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from verl_fp16.mismatch import alarm_rules
from verl_fp16.mismatch.definitions import STATISTICS
from verl_fp16.mismatch_settings import MismatchSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "mismatch.md").read_text()
OVERRIDE = re.compile(r"(?<![\w.])'?(\+?\w+(?:\.\w+)*=(?:\$\{[\w.]+\}|[\w.+-]*\w))")


def compose_with(*overrides: str):
    import verl  # noqa: F401  loads the plugin, and with it the resolver of the flag

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def test_the_generated_tables_are_current():
    check = [sys.executable, "scripts/mismatch_page.py", "--check"]
    process = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_the_pages_defaults_are_those_of_the_settings():
    told = {}
    for names, values in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]*?(?:\\\|[^|]*?)*\| ([\d.e, -]+) \|", PAGE, re.M):
        told |= dict(zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True))
    for name, default in re.findall(r"^\| `(\w+)` \| `?(\w+)`? \|", PAGE.partition("## Settings")[2], re.M):
        told[name] = default
    assert told == {
        name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in asdict(MismatchSettings()).items()
    }


def test_the_page_names_metrics_that_there_are():
    known = {statistic.name for statistic in STATISTICS}
    named = set(re.findall(r"`((?:log_prob|prob|seq|slope|nonfinite|ratio|token)_\w+)`", PAGE)) - {"token_id"}
    columns = {"seq_log_ratio_mean", "seq_log_ratio_std", "log_prob_abs_diff_mean"}
    assert named and named - columns <= known


@pytest.mark.parametrize("rule", alarm_rules.ADVICE)
def test_every_override_of_an_advice_is_taken_by_hydra_and_the_flag(rule):
    advice = alarm_rules.ADVICE[rule]
    overrides = [override for override in OVERRIDE.findall(advice) if "FOLDER" not in override]
    assert overrides, advice
    precision = [override for override in overrides if override.startswith("+precision")] or ["+precision=fp16"]
    config = compose_with(*precision, *(override for override in overrides if not override.startswith("+precision")))
    assert config.verl_fp16.train_dtype


def test_the_pages_overrides_are_taken():
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)
    overrides = [override for block in blocks for override in OVERRIDE.findall(block)]
    assert len(overrides) >= 6
    config = compose_with("+precision=fp16", *dict.fromkeys(o for o in overrides if not o.startswith("+precision")))
    assert config.actor_rollout_ref.actor.policy_loss.rollout_correction.bypass_mode is True
    assert config.verl_fp16.mismatch.on_alarm == "stop"
