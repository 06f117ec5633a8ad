"""``verl-fp16 config``: what a recipe or a flag changes in verl's configuration."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from verl_fp16.cli.output import fail, print_table


def register(app: typer.Typer) -> None:
    app.command("config")(config)


def config(
    arguments: Annotated[list[str], typer.Argument(metavar="RECIPE|OVERRIDE", help="A recipe and/or Hydra overrides.")],
    diff: Annotated[bool, typer.Option("--diff", help="A unified diff of the two configurations.")] = False,
    whole: Annotated[bool, typer.Option("--all", help="The whole configuration as YAML.")] = False,
) -> None:
    """Show what a recipe or overrides change, against the installed verl's own configuration.

    What contradicts the precision flag is told too, on stderr; the exit code is 1 then, and 2 where there is no
    configuration to print. So are keys that verl does not have, as a warning. Values that only verl itself checks, such
    as batch sizes, are not: it does so at the start.

    Example: verl-fp16 config +precision=fp16
    """
    from verl_fp16 import config_difference as difference
    from verl_fp16.findings import errors, render_errors, render_warnings
    from verl_fp16.installed import VerlNotFound, find_verl
    from verl_fp16.recipe_files import RecipeError, find_recipe, require_trainer
    from verl_fp16.refusal import GuardError
    from verl_fp16.unknown_keys import unknown_keys

    if diff and whole:
        raise fail("--diff and --all exclude each other")
    recipe_name, overrides = _split(arguments)
    try:
        verl = find_verl()
        recipe = find_recipe(recipe_name) if recipe_name else None
        if recipe is not None:
            require_trainer(recipe)
        composed = difference.compose(verl.config_dir, overrides, recipe)
        theirs = difference.compose(verl.config_dir, ()).values
    except (RecipeError, VerlNotFound, difference.CompositionError, GuardError) as error:
        raise fail(error) from None
    ours = composed.values
    if whole:
        typer.echo(difference.as_yaml(ours), nl=False)
    elif diff:
        typer.echo(difference.unified(theirs, ours, " ".join(arguments)), nl=False)
    else:
        rows = [
            (change.key, difference.as_text(change.theirs), difference.as_text(change.ours))
            for change in difference.changes(theirs, ours)
        ]
        if rows or not sys.stdout.isatty():
            print_table(("key", f"verl {verl.version}", "here"), rows)
        if not rows:
            typer.echo("verl-fp16: no difference", err=True)
    typer.echo(render_warnings([*composed.findings, *unknown_keys(ours, theirs, verl.folder)]), err=True, nl=False)
    if errors(composed.findings):
        typer.echo(render_errors(composed.findings), err=True, nl=False)
        raise typer.Exit(1)


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, if the first argument is one, and the overrides."""
    first = arguments[0]
    # An override has a "=" or begins with "~"; a path may have a "=" too.
    if first.startswith(("+", "~")) or ("=" in first and not (os.sep in first and first.endswith(".yaml"))):
        return None, arguments
    return first, arguments[1:]
