"""The application: to add a command, write a module with ``register(app)`` and name it in :data:`COMMANDS`."""

from __future__ import annotations

from typing import Annotated

import typer

from verl_fp16 import __version__
from verl_fp16.cli import (
    config,
    data,
    doctor,
    mismatch,
    patch_source,
    preflight,
    recipes,
    report,
    run,
    sanity_set,
    selftest,
    tokens,
)

COMMANDS = (run, recipes, config, doctor, selftest, preflight, data, mismatch, sanity_set, tokens, report, patch_source)
"""In the order in which ``--help`` shows them."""

app = typer.Typer(
    help="FP16 training and rollout for verl.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"verl-fp16 {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """FP16 training and rollout for verl."""


for _command in COMMANDS:
    _command.register(app)
