"""Every key that a recipe sets is one that verl has and reads, and sets it to something else than it was."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from recipe_readers import CONF, NAMES, RECIPES, SCALED, Reads, Written, merged_files, written_keys, yaml_parsed_once
from recipes_passive import FREE, HANDED_ON, NEW_IN_0_9, REPEATED
from releases import RELEASES, release_folder

from verl_fp16.config_difference import flatten

CASES = {
    **{name: (name, ()) for name in NAMES},
    **{case: (name, (f"scale={s}",)) for case, (name, s) in SCALED.items()},
}


@dataclass(frozen=True)
class Composition:
    """One recipe: what its files write, and what Hydra made of it, interpolations as written."""

    files: tuple[str, ...]
    written: tuple[Written, ...]
    leaves: Mapping[str, Any]


def config_of(release: str) -> str:
    return str(release_folder(release) / "verl" / "trainer" / "config")


def leaves_of(name: str, overrides: Collection[str] = ()) -> dict[str, Any]:
    return dict(flatten(OmegaConf.to_container(compose(name, overrides=list(overrides)), resolve=False)))


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Any]]:
    """verl's own configuration in each release."""
    found = {}
    for release in RELEASES:
        with initialize_config_dir(config_of(release), version_base=None):
            found[release] = leaves_of("ppo_trainer")
    return found


@pytest.fixture(scope="module")
def recipes(plain) -> dict[str, Composition | HydraException]:
    """Every recipe on the newest release, or why Hydra does not compose it."""
    found: dict[str, Composition | HydraException] = {}
    with yaml_parsed_once(), initialize_config_dir(config_of(RELEASES[-1]), version_base=None):
        for case, (name, overrides) in CASES.items():
            try:
                files = merged_files(name, overrides)
                written = written_keys(files, plain[RELEASES[-1]])
                names = tuple(file for file, path in files if path.is_relative_to(RECIPES))
                found[case] = Composition(names, tuple(written), leaves_of(name, overrides))
            except HydraException as error:
                found[case] = error
    return found


@pytest.fixture(scope="module")
def composed(recipes) -> list[Composition]:
    return [recipe for recipe in recipes.values() if isinstance(recipe, Composition)]


@pytest.fixture(scope="module")
def reads(plain, composed) -> dict[str, Reads]:
    ours = [recipe.leaves for recipe in composed]
    return {release: Reads(release_folder(release), [plain[release], *ours]) for release in RELEASES}


def matches(key: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def unknown(keys: Collection[str], plain: Mapping[str, Any], excepted: Collection[str]) -> list[str]:
    """The keys that are neither in verl's configuration, as leaf or as node, nor excepted."""
    nodes = {key.rsplit(".", depth)[0] for key in plain for depth in range(key.count(".") + 1)}
    return sorted(key for key in keys if key not in nodes and not matches(key, excepted))


def excepted_in(release: str) -> list[str]:
    return [*FREE, *(NEW_IN_0_9 if release == "0.8.0" else ())]


def all_keys(composed: Collection[Composition]) -> set[str]:
    return {written.key for recipe in composed for written in recipe.written}


@pytest.mark.parametrize("case", CASES)
def test_the_last_word_on_a_key_is_what_is_composed(recipes, case):
    recipe = recipes[case]
    assert isinstance(recipe, Composition), recipe
    last = {written.key: written.value for written in recipe.written if written.last}
    assert len(last) > 25
    assert {key: recipe.leaves.get(key) for key in last} == last


@pytest.mark.parametrize("release", RELEASES)
def test_every_key_is_one_that_verl_has(plain, composed, release):
    assert unknown(all_keys(composed), plain[release], excepted_in(release)) == []


@pytest.mark.parametrize("release", RELEASES)
def test_every_key_is_read(reads, composed, release):
    keys = {key for key in all_keys(composed) if key not in HANDED_ON}
    if release == "0.8.0":
        keys = {key for key in keys if not matches(key, NEW_IN_0_9)}
    assert sorted(key for key in keys if not reads[release].reads(key)) == []


def repeated(composed: Collection[Composition]) -> set[tuple[str, str]]:
    """File and key of what changes nothing in any recipe: the value was there before."""
    same, other = set(), set()
    for recipe in composed:
        for written in recipe.written:
            (same if written.value == written.before else other).add((written.file, written.key))
    return same - other


def overwritten(composed: Collection[Composition]) -> set[tuple[str, str]]:
    """File and key of what is overwritten in every recipe; ``???`` is there to be overwritten."""
    lost, last = set(), set()
    for recipe in composed:
        for written in recipe.written:
            if written.value != "???":
                (last if written.last else lost).add((written.file, written.key))
    return lost - last


def test_every_value_is_another_than_it_was_or_repeated_for_a_reason(composed):
    assert sorted((file, key) for file, key in repeated(composed) if key not in REPEATED) == []


def test_no_value_is_overwritten_in_every_recipe(composed):
    assert sorted(overwritten(composed)) == []


def test_every_group_is_in_some_recipe(composed):
    files = {str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml")}
    used = {file for recipe in composed for file in recipe.files}
    assert files - used - set(NAMES) == set()


@pytest.mark.parametrize("release", RELEASES)
def test_no_file_of_ours_hides_behind_one_of_verls(release):
    """verl's own folder is the first on Hydra's search path."""
    ours = [path.relative_to(root) for root in (RECIPES, CONF) for path in root.rglob("*.yaml")]
    assert len(ours) > 50
    assert [str(path) for path in ours if (release_folder(release) / "verl/trainer/config" / path).exists()] == []


def test_no_exception_is_stale(plain, reads, composed):
    keys, newest = all_keys(composed), RELEASES[-1]
    for pattern in FREE:
        assert unknown(fnmatch.filter(keys, pattern), plain[newest], ()), pattern
    for pattern in NEW_IN_0_9:
        assert unknown(fnmatch.filter(keys, pattern), plain["0.8.0"], ()), pattern
        assert not unknown(fnmatch.filter(keys, pattern), plain[newest], ()), pattern
    assert {key for key in HANDED_ON if key not in keys} == set()
    assert set(REPEATED) - {key for _, key in repeated(composed)} == set()
    for reason in (*FREE.values(), *NEW_IN_0_9.values(), *HANDED_ON.values(), *REPEATED.values()):
        assert len(reason) > 10


def test_what_is_wrong_with_a_key_is_found(plain, reads):
    """Planted: a slip, a node in the wrong place, a name nobody reads, a value that is lost, one that was there."""
    newest = RELEASES[-1]
    slips = ("actor_rollout_ref.actor.clip_ratio_hihg", "actor_rollout_ref.actor.model.path", "trainer.sampler.name")
    assert unknown(slips, plain[newest], excepted_in(newest)) == sorted(slips)
    for key in (
        "actor_rollout_ref.actor.clip_ratio_hihg",
        "actor_rollout_ref.actor.path_of_nobody",
        "transformers.path",
    ):
        assert not reads[newest].reads(key), key
    assert reads[newest].reads("actor_rollout_ref.actor.clip_ratio_high")
    first, second = RECIPES / "algo" / "gspo.yaml", RECIPES / "algo" / "dapo.yaml"
    written = written_keys([("algo/gspo", first), ("algo/dapo", second)], plain[newest])
    planted = [Composition(("algo/gspo", "algo/dapo"), tuple(written), {})]
    assert ("algo/gspo", "actor_rollout_ref.actor.clip_ratio_low") in overwritten(planted)
    assert ("algo/dapo", "actor_rollout_ref.actor.clip_ratio_low") not in repeated(planted), "0.2 after 3e-4"
    alone = [Composition(("algo/dapo",), tuple(written_keys([("algo/dapo", second)], plain[newest])), {})]
    assert ("algo/dapo", "actor_rollout_ref.actor.clip_ratio_low") in repeated(alone)
