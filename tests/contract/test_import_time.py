"""The plugin's cost in every process that imports verl, with or without the flag."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.mark.alone
def test_plugin_adds_less_than_20_ms_to_import_verl():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        from import_time import measure
    finally:
        sys.path.pop(0)
    _, plugin = measure(runs=5)
    assert plugin < 0.020
