"""The application itself: quick, complete, and every command documented."""

from __future__ import annotations

import subprocess
import sys

import typer
from typer.testing import CliRunner

from verl_fp16 import __version__
from verl_fp16.cli.app import COMMANDS, app

HEAVY = {"torch", "verl", "ray", "vllm", "transformers", "hydra", "omegaconf", "numpy"}


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom verl_fp16.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stderr.strip() == "[]"
    assert "run" in process.stdout


def test_every_command_has_its_module_and_its_help():
    group = typer.main.get_command(app)
    modules = {module.__name__.rpartition(".")[2].replace("_", "-") for module in COMMANDS}
    assert modules == set(group.commands)
    for name in group.commands:
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0
        assert group.commands[name].help


def test_version():
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == f"verl-fp16 {__version__}"
