"""A start without the start: composed, and held against the guard, as ``verl-fp16 config`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl_fp16 import hydra_options
from verl_fp16.config_difference import CompositionError, compose
from verl_fp16.findings import Finding, errors, render_errors
from verl_fp16.installed import InstalledVerl
from verl_fp16.recipe_files import Recipe
from verl_fp16.refusal import GuardError
from verl_fp16.unknown_keys import unknown_keys


@dataclass(frozen=True)
class Rehearsal:
    """What a start would do.

    Args:
        runs: what each run of a sweep sets, in their order; empty without a sweep.
        warnings: of all runs, each once.
    """

    runs: tuple[str, ...]
    warnings: tuple[Finding, ...]


def rehearse(verl: InstalledVerl, arguments: Sequence[str], recipe: Recipe) -> Rehearsal:
    """Compose what ``arguments`` would start, each run of a sweep by itself.

    Raises:
        CompositionError: Hydra would refuse it.
        GuardError: the guard would refuse it.
    """
    from hydra.errors import HydraException

    given = hydra_options.options(arguments)
    if given is None:
        told = " ".join(argument for argument in arguments if argument.startswith("-"))
        raise CompositionError(f"Hydra does not take the options {told} as they are: `--hydra-help` lists them")
    sweep = not given.cfg and hydra_options.is_sweep(verl.config_dir, arguments, recipe)
    try:
        runs = hydra_options.sweep_runs(verl.config_dir, given.overrides, recipe) if sweep else [given.overrides]
    except HydraException:
        runs, sweep = [given.overrides], False  # composing it tells why
    shared = [override for override in given.overrides if override.startswith("hydra")] if sweep else []
    plain = compose(verl.config_dir, ()).values
    found: dict[str, Finding] = {}
    for overrides in runs:
        where = f"{' '.join(overrides)}: " if sweep else ""
        for finding in _findings(verl, [*shared, *overrides], recipe, where, plain):
            found.setdefault(finding.key, finding)
    return Rehearsal(tuple(" ".join(run) for run in runs) if sweep else (), tuple(found.values()))


def _findings(verl: InstalledVerl, overrides: list[str], recipe: Recipe, where: str, plain: dict) -> list[Finding]:
    try:
        composed = compose(verl.config_dir, overrides, recipe)
    except CompositionError as error:
        raise CompositionError(f"{where}{error}") from None
    except GuardError as error:
        raise GuardError(f"{where}{error}") from None
    if errors(composed.findings):
        raise GuardError(f"{where}{render_errors(composed.findings)}")
    return [*composed.findings, *unknown_keys(composed.values, plain, verl.folder)]
