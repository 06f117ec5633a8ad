"""``verl-fp16 patch-source``: put the hooks' calls into a source tree of verl."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_fp16.cli.output import fail


def register(app: typer.Typer) -> None:
    app.command("patch-source")(patch_source)


def patch_source(
    tree: Annotated[Path, typer.Argument(metavar="PATH", help="The folder that contains the package folder verl.")],
    check: Annotated[bool, typer.Option("--check", help="Change nothing: say whether it is in, or fits.")] = False,
    reverse: Annotated[bool, typer.Option("--reverse", help="Take the patch out again.")] = False,
) -> None:
    """Patch a source tree of verl, for people who build verl from a fork. The patch is chosen by the tree's release.

    Example: verl-fp16 patch-source ~/src/verl --check
    """
    from verl_fp16.source_patch import PatchRefused, apply, release_of, state_of

    if check and reverse:
        raise fail("--check and --reverse exclude each other: --check says both whether the patch is in and would fit")
    try:
        name = f"{tree}: verl {release_of(tree)}"
        if check:
            typer.echo(f"{name}, {state_of(tree).value}; the patch of this release fits")
        elif apply(tree, reverse=reverse):
            typer.echo(f"{name}, {'no longer patched' if reverse else 'patched'}")
        else:
            typer.echo(f"{name}, {'not patched' if reverse else 'patched'} already: nothing to do")
    except PatchRefused as error:
        raise fail(error, code=1) from None
