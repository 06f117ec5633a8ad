"""Calls of the command mismatch with both sides faked, for its tests."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from verl_fp16.cli.app import app

PROMPTS = 6
OPTIONS = ("--samples", "20", "--max-tokens", "24")


def mismatch(model, *options: str, output: str = "out", prompts: str = "prompts.txt"):
    return CliRunner().invoke(app, ["mismatch", str(model), "--prompts", prompts, "-o", output, *options])


def refused(result, code: int = 2) -> str:
    assert result.exit_code == code and result.stdout == "", (result.output, result.exception)
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1].removeprefix("verl-fp16: ")


def read(output: str = "out") -> dict:
    return json.loads(open(f"{output}/mismatch.json").read(), parse_constant=pytest.fail)
