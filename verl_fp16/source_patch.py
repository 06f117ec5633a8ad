"""Applies ``patches/verl-<release>.diff`` to a source tree of verl, or takes it out again, by ``git apply``.

For people who build verl from a fork. A patch is applied wholly or not at all.
"""

from __future__ import annotations

import os
import re
import subprocess
from enum import Enum
from pathlib import Path

from verl_fp16.releases import SUPPORTED_VERL

PATCHES = Path(__file__).parent / "patches"


class PatchRefused(RuntimeError):
    """The tree is not one that a patch of ours fits; the message says what was found and what to do."""


class State(str, Enum):
    """How a tree stands to the patch of its release."""

    RELEASED = "not patched"
    PATCHED = "patched"


def release_of(tree: Path) -> str:
    """The supported release that a source tree of verl is of; a development version counts as the one it leads to.

    Raises:
        PatchRefused: it is no source tree of verl, or of a release that there is no patch for.
    """
    from packaging.version import InvalidVersion, Version

    file = tree / "verl" / "version" / "version"
    if not file.is_file():
        raise PatchRefused(
            f"{tree} is no source tree of verl: it has no verl/version/version. Name the folder that contains the "
            "package folder verl (a checkout, an unpacked wheel, site-packages)."
        )
    found = file.read_text().strip()
    try:
        release = Version(found).base_version
    except InvalidVersion:
        release = found
    if release not in SUPPORTED_VERL:
        raise PatchRefused(
            f"{tree} is verl {found}; there are patches for {', '.join(SUPPORTED_VERL)} only. "
            "Check out one of these releases, or use the runtime hooks on a released wheel."
        )
    return release


def state_of(tree: Path) -> State:
    """Whether the patch of the tree's release is in it.

    Raises:
        PatchRefused: neither the patch nor its reverse fits, with the places that do not.
    """
    patch = PATCHES / f"verl-{release_of(tree)}.diff"
    if _git_apply(tree, patch, "--check", "--reverse").returncode == 0:
        return State.PATCHED
    check = _git_apply(tree, patch, "--check")
    if check.returncode == 0:
        return State.RELEASED
    places = re.findall(r"^error: (?:patch failed: )?(.+)$", check.stderr, re.M)
    raise PatchRefused(
        f"{patch.name} does not fit {tree}, nothing was changed. These places are not as in the release: "
        f"{'; '.join(place for place in places if 'does not apply' not in place) or check.stderr.strip()}. "
        f"Undo the changes there, or put the calls in by hand: {patch} shows them."
    )


def apply(tree: Path, reverse: bool = False) -> bool:
    """Put the patch into ``tree``, or take it out.

    Returns:
        whether anything was changed; False where the tree was so already.

    Raises:
        PatchRefused: as :func:`state_of`.
    """
    wanted = State.RELEASED if reverse else State.PATCHED
    if state_of(tree) is wanted:
        return False
    patch = PATCHES / f"verl-{release_of(tree)}.diff"
    done = _git_apply(tree, patch, *(["--reverse"] if reverse else []))
    if done.returncode or state_of(tree) is not wanted:
        raise PatchRefused(f"git apply {patch.name} in {tree} failed: {done.stderr.strip()}")
    return True


def _git_apply(tree: Path, patch: Path, *options: str) -> subprocess.CompletedProcess[str]:
    if os.pathsep in str(tree.resolve().parent):
        raise PatchRefused(
            f"{tree} lies in a folder with {os.pathsep!r} in its name, which git cannot be told of: move it"
        )
    # In a folder below a repository git would pass over every file without a word: it must not find that repository.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent), "LC_ALL": "C"}
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        environment.pop(name, None)
    command = ["git", "apply", "--whitespace=nowarn", *options, str(patch.resolve())]
    try:
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise PatchRefused("git was not found; install it: the patch is applied with git apply") from None
