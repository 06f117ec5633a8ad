"""The recipe of the trainer's tests on a GPU, on every supported verl: complete, and small enough to start."""

from __future__ import annotations

from pathlib import Path

import pytest
from releases import RELEASES, release_folder

from verl_fp16.config_difference import compose, flatten
from verl_fp16.recipe_files import find_recipe

RECIPE = Path(__file__).parents[1] / "gpu" / "sums_gpu.yaml"


@pytest.fixture(scope="module", params=RELEASES)
def values(request) -> dict:
    composed = compose(release_folder(request.param) / "verl" / "trainer" / "config", (), find_recipe(str(RECIPE)))
    assert composed.findings == ()
    return composed.values


def test_the_rollout_is_vllms_in_float16_and_nothing_of_it_is_left_open(values):
    roles = values["actor_rollout_ref"]
    assert (roles["rollout"]["name"], roles["rollout"]["dtype"]) == ("vllm", "float16")
    assert [key for key, value in flatten(roles) if value == "???"] == []


def test_it_has_a_place_for_each_of_its_processes_on_a_machine_with_few_cores(values):
    """Ray gives places out by cores where no number is set, and the trainer waits for ever for one that is missing."""
    assert values["ray_kwargs"]["ray_init"]["num_cpus"] >= 16
    assert values["transfer_queue"]["backend"]["SimpleStorage"]["num_data_storage_units"] == 1
    assert values["actor_rollout_ref"]["rollout"]["agent"]["num_workers"] == 1
    assert values["reward"]["num_workers"] == 1
