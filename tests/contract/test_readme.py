"""The README's measured tables are what the result files say, and its file names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_are_current():
    check = [sys.executable, "scripts/readme_tables.py", "--check"]
    process = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_named_files_exist():
    text = (ROOT / "README.md").read_text()
    names = set(re.findall(r"\(((?:verl_fp16|recipes|tests|benchmarks|patches)/[\w./]+)\)", text))
    names |= set(re.findall(r"`((?:verl_fp16|scripts|benchmarks|recipes)/[\w./-]+)`", text))
    assert len(names) > 5
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_drill_of_the_documentation_is_what_hydra_and_the_settings_take():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from verl_fp16.settings import Settings

    page = (Path(__file__).parents[2] / "docs" / "loss-scale.md").read_text()
    (override,) = re.findall(r"'(verl_fp16\.fault_injection=.*)'", page)
    faults = OverridesParser.create().parse_override(override).value()
    settings = Settings.from_node({"fault_injection": faults})
    assert [fault.target for fault in settings.fault_injection] == ["gradient", "loss"]


def test_the_pages_settings_and_defaults_are_those_of_the_code():
    from dataclasses import asdict

    from verl_fp16.loss_scale_settings import LossScaleSettings

    page = (Path(__file__).parents[2] / "docs" / "loss-scale.md").read_text()
    table = page.partition("## Settings")[2].partition("## Reading")[0]
    told = {}
    for names, values in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", table, re.M):
        told |= dict(zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True))
    written = {name: "null" if value is None else value for name, value in asdict(LossScaleSettings()).items()}
    form = {
        name: str(value).lower() if isinstance(value, bool | str) else f"{value:g}" for name, value in written.items()
    }
    assert {name: value.strip() for name, value in told.items()} == form
