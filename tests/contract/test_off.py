"""Off means off: a process with the package installed and no flag is the process without it.

Two fresh processes for each release import what a run of verl imports, one with this package and one in which it is
hidden. Everything that one could tell them apart by is compared, for every hook that is declared.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from releases import RELEASES, release_environment

from verl_fp16.cpu.plugin import DRIVER_HOOKS
from verl_fp16.hooks import HOOKS

CHILD = Path(__file__).parent / "process_state.py"

# In every process that imports verl, so they may not import torch, Ray or vLLM, nor do any work.
OUR_MODULES = re.compile(
    r"verl_fp16(\.(plugin|switch|releases|patching(\..+)?|hooks|hooks\.entry|cpu|cpu\.(plugin|choice)))?"
)
FOREIGN_MODULES = re.compile(r"packaging\..+|hydra_plugins")

REGISTRIES = (
    "verl.workers.engine.base:EngineRegistry._engines",
    "verl.plugin.platform.platform_manager:PlatformRegistry._platforms",
    "verl.trainer.ppo.v1.trainer_base:TRAINER_REGISTRY",
    "verl.workers.reward_manager.registry:REWARD_MANAGER_REGISTRY",
    "verl.workers.rollout.base:_ROLLOUT_REGISTRY",
    "verl.workers.rollout.replica:RolloutReplicaRegistry._registry",
    "verl.checkpoint_engine.base:CheckpointEngineRegistry._registry",
    "verl.trainer.ppo.core_algos:POLICY_LOSS_REGISTRY",
    "verl.trainer.ppo.core_algos:ADV_ESTIMATOR_REGISTRY",
    "verl.single_controller.base.decorator:DISPATCH_MODE_FN_REGISTRY",
)
# verl finds vLLM's CPU build in the CPU room only; what is added there is a method, which nothing of verl calls.
NEEDS_VLLM = "verl.workers.rollout.vllm_rollout."
NEW_IN_0_9 = (
    "verl.plugin.platform.platform_manager:PlatformRegistry._platforms",
    "verl.trainer.ppo.v1.trainer_base:TRAINER_REGISTRY",
)


class Pair(NamedTuple):
    """What the two processes of one release wrote."""

    release: str
    plain: dict
    installed: dict
    plain_output: str
    installed_output: str


@pytest.fixture(scope="module", params=RELEASES)
def pair(request, tmp_path_factory) -> Pair:
    release, folder = request.param, tmp_path_factory.mktemp("process-state")
    targets = [hook.target.path for hook in (*HOOKS, *DRIVER_HOOKS) if hook.target.qualname]
    children = {}
    for what in ("plain", "installed"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
        environment |= release_environment(release)
        if what == "plain":
            environment.pop("VERL_USE_EXTERNAL_MODULES", None)
        command = [sys.executable, str(CHILD), str(folder / f"{what}.json"), what, json.dumps(targets)]
        children[what] = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    try:
        outputs = {what: child.communicate(timeout=120)[0] for what, child in children.items()}
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    for what, child in children.items():
        assert child.returncode == 0, f"{what}: {outputs[what]}"
    states = {what: json.loads((folder / f"{what}.json").read_text()) for what in children}
    return Pair(release, states["plain"], states["installed"], outputs["plain"], outputs["installed"])


def differences(plain: dict, installed: dict) -> dict:
    """Key -> (without, with) where the two differ."""
    keys = plain.keys() | installed.keys()
    pairs = {key: (plain.get(key, "absent"), installed.get(key, "absent")) for key in keys}
    return {key: values for key, values in pairs.items() if values[0] != values[1]}


def test_the_two_processes_are_what_is_to_be_compared(pair):
    """One has every hook of its release in place, the other has never heard of this package."""
    assert pair.plain["verl"] == pair.installed["verl"] == pair.release
    assert {hook.name for hook in HOOKS} == pair.installed["hooks"].keys()
    for hook in HOOKS:
        status = pair.installed["hooks"][hook.name].partition(":")[0]
        there = "pending" if hook.target.module.startswith(NEEDS_VLLM) else "applied"
        assert status == (there if hook.is_for(pair.release) else "not needed"), hook.name
    assert [name for name in pair.plain["modules"] if "verl_fp16" in name] == []


def test_targets_look_alike_to_verl_ray_and_pickle(pair):
    assert differences(pair.plain["targets"], pair.installed["targets"]) == {}
    for hook in (*HOOKS, *DRIVER_HOOKS):
        if hook.is_for(pair.release) and hook.target.qualname:
            assert pair.plain["targets"][hook.target.path] is not None, hook.target.path


def test_no_name_is_added_or_removed_where_targets_live(pair):
    assert differences(pair.plain["names"], pair.installed["names"]) == {}
    expected = {hook.target.module for hook in HOOKS if hook.is_for(pair.release)}
    assert {module for module in expected if not module.startswith(NEEDS_VLLM)} <= pair.plain["names"].keys()


def test_registries_are_equal(pair):
    assert differences(pair.plain["registries"], pair.installed["registries"]) == {}
    found = {name for name, entries in pair.plain["registries"].items() if entries}
    assert set(REGISTRIES) - found == {name for name in NEW_IN_0_9 if pair.release == "0.8.0"}


def test_worker_methods_keep_their_dispatch(pair):
    assert differences(pair.plain["dispatched methods"], pair.installed["dispatched methods"]) == {}
    assert len(pair.plain["dispatched methods"]) > 40


def test_composed_configurations_are_equal(pair):
    """Also after ``auto_set_device``, the first thing that verl does with a configuration."""
    assert differences(pair.plain["configurations"], pair.installed["configurations"]) == {}
    assert "ppo_trainer in the driver" in pair.plain["configurations"]


@pytest.mark.parametrize("when", ("process after import verl", "process"))
def test_the_process_is_left_as_verl_leaves_it(pair, when):
    """Environment, loggers, warnings, random numbers, torch's defaults, signals, threads, functions at exit."""
    assert differences(pair.plain[when], pair.installed[when]) == {}


def test_nothing_heavy_is_imported(pair):
    key = "modules after import verl"
    added = set(pair.installed[key]) - set(pair.plain[key])
    ours = {name for name in added if name.partition(".")[0] == "verl_fp16"}
    assert {name for name in ours if not OUR_MODULES.fullmatch(name)} == set()
    assert {name for name in added - ours if not FOREIGN_MODULES.fullmatch(name)} == set()
    assert "verl_fp16.plugin" in ours
    assert set(pair.plain[key]) - set(pair.installed[key]) == set()


def test_a_run_imports_no_foreign_module_that_it_would_not_have(pair):
    added = set(pair.installed["modules"]) - set(pair.plain["modules"])
    assert [m for m in sorted(added) if not re.match(r"verl_fp16\b|hydra_plugins\b|packaging\.", m)] == []


def test_what_is_added_to_the_process_is_what_is_stated(pair):
    """An import finder that waits for the targets' modules, and the resolver of the flag's configuration."""
    finders = [finder for finder in pair.installed["meta_path"] if finder != "PostImportFinder"]
    assert finders == pair.plain["meta_path"]
    assert set(pair.installed["resolvers"]) - set(pair.plain["resolvers"]) == {"verl_fp16", "verl_fp16_cpu"}


def test_foreign_code_holds_no_function_of_ours_but_the_declared_hooks(pair):
    """Whatever module or class holds it: what is not a record in HOOKS was changed behind the records' back."""
    hooks = {hook.name for hook in (*HOOKS, *DRIVER_HOOKS)}
    held = pair.installed["functions of ours elsewhere"]
    assert {where: hook for where, hook in held.items() if hook not in hooks} == {}
    assert {hook.target.path for hook in HOOKS if hook.is_for(pair.release) and hook.target.qualname} <= held.keys()


def test_nothing_is_said(pair):
    def words(output: str) -> list[str]:
        return re.sub(r"\d+:\d\d:\d\d,\d+", "TIME", output).splitlines()

    assert words(pair.installed_output) == words(pair.plain_output)


@pytest.mark.parametrize(
    "hook", [hook for hook in (*HOOKS, *DRIVER_HOOKS) if hook.target.qualname], ids=lambda h: h.name
)
def test_a_wrapper_passes_arguments_results_and_errors_through(pair, hook):
    if hook.is_for(pair.release):
        assert pair.installed["pass through"][hook.name] == []
    else:
        assert hook.name not in pair.installed["pass through"]
