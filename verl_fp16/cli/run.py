"""``verl-fp16 run``: start a recipe through verl's own launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from verl_fp16.cli.output import fail

if TYPE_CHECKING:
    from verl_fp16.installed import InstalledVerl
    from verl_fp16.recipe_files import Recipe

TIMED_OUT = 124  # as timeout(1)
INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    # Options that are not ours are Hydra's: they become arguments, in their order, and pass through.
    app.command("run", context_settings={"ignore_unknown_options": True})(run)


def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or the path of a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="OVERRIDE", help="Hydra overrides and options, passed on as they are.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check as `config` does, print the command and what it runs; start nothing."),
    ] = False,
    supervised: Annotated[
        bool,
        typer.Option("--supervised", help="End the run if a worker dies; leave no process or shared memory behind."),
    ] = False,
    log_file: Annotated[
        Path | None,
        typer.Option("--log-file", help="With --supervised: where the log goes; outputs/RECIPE.log if left out."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, help="With --supervised: end the run after this many seconds.")
    ] = None,
) -> None:
    """Start a recipe with verl's PPO trainer; the exit code is the trainer's, and 2 where --dry-run finds a mistake.

    Example: verl-fp16 run quickstart trainer.total_training_steps=5 --cfg job
    """
    from verl_fp16.installed import VerlNotFound, find_verl
    from verl_fp16.launch import LaunchError, plan_launch
    from verl_fp16.recipe_files import RecipeError, find_recipe

    if not supervised and (log_file is not None or timeout is not None):
        raise fail("--log-file and --timeout belong to --supervised: add it")
    try:
        found, verl = find_recipe(recipe), find_verl()
        launch = plan_launch(found, overrides or (), verl, os.environ)
    except (RecipeError, VerlNotFound, LaunchError) as error:
        raise fail(error) from None
    if supervised:
        _refuse_sweep(found, overrides or (), verl)
    if dry_run:
        _rehearse(found, overrides or (), verl)
        typer.echo(launch.as_shell())
        return
    environment = {**os.environ, **launch.environment}
    if supervised:
        log = log_file or Path("outputs") / f"{found.name}.log"
        raise typer.Exit(_run_supervised(launch.command, environment, log, timeout))
    sys.stdout.flush()
    sys.stderr.flush()
    # This process becomes the trainer: signals and exit code are its own, with nothing in between.
    os.execve(launch.command[0], launch.command, environment)


def _refuse_sweep(recipe: Recipe, overrides: Sequence[str], verl: InstalledVerl) -> None:
    from verl_fp16.hydra_options import is_sweep

    if is_sweep(verl.config_dir, overrides, recipe):
        raise fail(
            "--supervised watches one run and would take the end of a sweep's first for a death: leave --supervised "
            "out, or start one of the runs, without --multirun and with hydra.mode=RUN"
        )


def _rehearse(recipe: Recipe, overrides: Sequence[str], verl: InstalledVerl) -> None:
    """Tell what would be refused or warned of, and the runs of a sweep, on stderr."""
    from verl_fp16.config_difference import CompositionError
    from verl_fp16.dry_run import rehearse
    from verl_fp16.findings import render_warnings
    from verl_fp16.refusal import GuardError

    if any(argument.startswith(("--config-d", "-cd")) for argument in overrides):
        typer.echo("verl-fp16: not checked: what is in the folder of --config-dir is Hydra's to find", err=True)
        return
    try:
        rehearsal = rehearse(verl, overrides, recipe)
    except (CompositionError, GuardError) as error:
        raise fail(error) from None
    typer.echo(render_warnings(rehearsal.warnings), err=True, nl=False)
    if rehearsal.runs:
        typer.echo(f"verl-fp16: a sweep of {len(rehearsal.runs)} runs, one after the other:", err=True)
        for number, run in enumerate(rehearsal.runs, 1):
            typer.echo(f"  {number}. {run}", err=True)


def _run_supervised(command: tuple[str, ...], environment: dict[str, str], log: Path, timeout: float | None) -> int:
    from verl_fp16.supervise import run_supervised

    follow = _Follower(log)
    try:
        result = run_supervised(command, log_path=log, env=environment, timeout_s=timeout, on_tick=follow)
    except KeyboardInterrupt:
        typer.echo("verl-fp16: interrupted; everything that was started has been ended", err=True)
        return INTERRUPTED
    except OSError as error:
        typer.echo(f"verl-fp16: {error}", err=True)
        return 1
    if result.ok:
        return 0
    typer.echo(f"verl-fp16: {result.cause}\nverl-fp16: the whole log: {log}", err=True)
    if timeout is not None and result.seconds > timeout:
        return TIMED_OUT
    code = result.returncode
    return 1 if not code else code if code > 0 else 128 - code


class _Follower:
    """Copies what a log gained since the last call to stdout."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._position = 0

    def __call__(self) -> None:
        with open(self._log, "rb") as log:
            log.seek(self._position)
            new = log.read()
        self._position += len(new)
        sys.stdout.write(new.decode(errors="replace"))
        sys.stdout.flush()
