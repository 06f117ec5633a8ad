"""``verl-fp16 recipes``: what is shipped, and copies of it to edit."""

from __future__ import annotations

from typing import Annotated

import typer

from verl_fp16.cli.output import fail, print_table

recipes = typer.Typer(help="List the shipped recipes, or copy one to edit.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(recipes, name="recipes")


@recipes.command("list")
def list_recipes() -> None:
    """List the shipped recipes: name, what it is made for, what it is."""
    from verl_fp16.recipe_files import shipped_recipes

    rows = ((recipe.name, recipe.hardware, recipe.summary) for recipe in shipped_recipes().values())
    print_table(("recipe", "hardware", "what it is"), rows)


@recipes.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name.")],
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="A .yaml file to write, or a folder to write it into.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Copy a shipped recipe, to edit it and start it with `verl-fp16 run FILE`."""
    from verl_fp16.recipe_files import RecipeError, copy_recipe

    try:
        target = copy_recipe(name, destination, force=force)
    except (RecipeError, OSError) as error:
        raise fail(error) from None
    typer.echo(str(target))
