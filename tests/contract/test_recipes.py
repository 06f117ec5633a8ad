"""Every recipe in every precision on every supported verl: Hydra composes it, the guard passes it, batches are even."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from recipe_readers import NAMES, PRECISIONS, SCALED
from releases import RELEASES, release_environment, release_folder

CHILD = Path(__file__).parent / "recipe_compositions.py"
NEWEST = RELEASES[-1]

DTYPES = {
    "fp16": ("float16", "float16"),
    "bf16": ("bfloat16", "bfloat16"),
    "bf16_train_fp16_rollout": ("bfloat16", "float16"),
    "bf16_train_fp32_rollout": ("bfloat16", "float32"),
    "fp32": ("float32", "float32"),
}
DAPO = ("cpu_dapo", "dapo_14b")
NAME, FOLDER = "trainer.experiment_name", "trainer.default_local_dir"

# Recipes that share a run's name and folder on purpose.
ONE_NAME = {
    "precision_ablation": "sanity_grpo in every precision, each under the name that it has there",
}
# Recipes whose precisions have one name and one folder.
ONE_NAME_FOR_ALL_PRECISIONS = {
    "quickstart": "python -m verl_fp16.quickstart gives each run a quickstart_dir of its own"
}

# Not in 0.8.0, which has its v1 trainer under an entry point of its own.
LEGACY = "trainer.use_v1=false"


@dataclass(frozen=True)
class Composed:
    """What one composition gave.

    Args:
        values: every leaf, interpolations resolved.
        findings: severity and key of what the guard says.
        refusal: what verl's own check says; None where it passes or was not asked.
        unset: the leaves that are ``???``, but for verl's own.
    """

    values: dict[str, Any]
    findings: list[str]
    refusal: str | None
    unset: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


Compositions = Callable[[str, str], Composed]


def requests(release: str) -> list[tuple[str, str, list[str], bool]]:
    """Name, recipe, overrides, and whether verl's own check is to be asked."""
    newest = release == NEWEST
    asked = [
        (f"{name} {precision}", name, [f"precision={precision}"], newest and precision == "fp16")
        for name in NAMES
        for precision in PRECISIONS
    ]
    asked += [(case, name, [f"scale={scale}"], newest) for case, (name, scale) in SCALED.items()]
    if release != "0.8.0":
        asked += [(f"{name} {LEGACY}", name, [LEGACY], False) for name in NAMES]
    return asked


def compositions(release: str, folder: Path, critic: Path) -> dict[str, Any]:
    """What a process with one release's verl makes of everything that is asked of it; some 70 s of a core."""
    asked, answer = folder / f"{release}-requests.json", folder / f"{release}.json"
    asked.write_text(json.dumps({"compose": requests(release), "critic": str(critic)}))
    environment = {**os.environ, **release_environment(release)}
    if release == NEWEST:
        environment["VERL_PLATFORM"] = "cpu"  # verl's check asks vLLM for its LoRA ranks
    command = [sys.executable, str(CHILD), str(asked), str(answer)]
    process = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=1800)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(answer.read_text())


@pytest.fixture(scope="module")
def composed(tmp_path_factory, tiny_model) -> Compositions:
    """What a release makes of a request; one process for each release, when it is first asked for."""
    folder = tmp_path_factory.mktemp("compositions")
    answers: dict[str, dict[str, Any]] = {}

    def find(release: str, name: str) -> Composed:
        if release not in answers:
            answers[release] = compositions(release, folder, tiny_model)
            assert Path(answers[release]["verl"]).is_relative_to(release_folder(release))
        found = answers[release]["composed"][name]
        assert "error" not in found, found["error"]
        unset = tuple(key for key, value in found["changed"].items() if value == "???")
        return Composed({**answers[release]["plain"], **found["changed"]}, found["findings"], found["refusal"], unset)

    return find


def refused(release: str, recipe: str, *, legacy: bool = False) -> list[str]:
    """What the guard has to say: no trainer of 0.8.0 filters groups or sees a chat template; no legacy one filters."""
    if recipe in DAPO and (legacy or release == "0.8.0"):
        return ["error: algorithm.filter_groups.enable"]
    if recipe == "octothinker_grpo" and release == "0.8.0":
        return ["error: actor_rollout_ref.model.custom_chat_template"]
    return []


def test_the_precisions_are_the_flags():
    assert set(PRECISIONS) == set(DTYPES)
    assert len(NAMES) > 30


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("recipe", NAMES)
def test_it_composes_in_every_precision_and_the_guard_passes_it(composed, release, recipe):
    for precision, (train, rollout) in DTYPES.items():
        found = composed(release, f"{recipe} {precision}")
        assert found.findings == refused(release, recipe), precision
        assert found.unset == (), precision
        assert found["actor_rollout_ref.rollout.dtype"] == rollout
        for role in ("actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config", "critic.fsdp"):
            assert found[f"{role}.mixed_precision.param_dtype"] == train


@pytest.mark.parametrize("release", RELEASES[1:])
@pytest.mark.parametrize("recipe", NAMES)
def test_the_legacy_trainer_takes_it_unless_it_filters_groups(composed, release, recipe):
    found = composed(release, f"{recipe} {LEGACY}")
    assert found["trainer.use_v1"] is False
    assert found.findings == refused(release, recipe, legacy=True)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("case", SCALED)
def test_the_guard_passes_it_on_more_gpus(composed, release, case):
    found = composed(release, case)
    assert found.findings == []
    assert f"gpus_{found['trainer.n_gpus_per_node']}" == SCALED[case][1]


def different(one: Composed, other: Composed) -> dict[str, tuple[Any, Any]]:
    """The leaves in which two precisions of a recipe differ, but for dtypes and the run's name in a text."""
    keys = one.values.keys() | other.values.keys()
    pairs = {key: (one.values.get(key, "absent"), other.values.get(key, "absent")) for key in keys}
    return {
        key: pair
        for key, pair in pairs.items()
        if pair[0] != pair[1]
        and not (key.endswith("dtype") and set(pair) <= {"float16", "bfloat16", "float32"})
        and str(pair[0]).replace(one[NAME], "NAME") != str(pair[1]).replace(other[NAME], "NAME")
    }


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("recipe", NAMES)
def test_precisions_differ_in_nothing_but_dtypes_and_the_runs_name(composed, release, recipe):
    twins = {precision: composed(release, f"{recipe} {precision}") for precision in PRECISIONS}
    for precision, twin in twins.items():
        assert different(twins["fp16"], twin) == {}, precision
    names = {twin[NAME] for twin in twins.values()}
    assert len(names) == (1 if recipe in ONE_NAME_FOR_ALL_PRECISIONS else len(PRECISIONS))


@pytest.mark.parametrize("release", RELEASES)
def test_another_recipe_is_no_twin(composed, release):
    """The comparison can fail."""
    one, other = (composed(release, f"{recipe} fp16") for recipe in ("sanity_grpo", "sanity_gspo"))
    assert "actor_rollout_ref.actor.policy_loss.loss_mode" in different(one, other)


@pytest.mark.parametrize("key", (NAME, FOLDER))
@pytest.mark.parametrize("release", RELEASES)
def test_no_two_runs_share_a_name_or_a_folder(composed, release, key):
    counted = Counter(
        composed(release, f"{recipe} {precision}")[key]
        for recipe in NAMES
        if recipe not in ONE_NAME
        for precision in (PRECISIONS if recipe not in ONE_NAME_FOR_ALL_PRECISIONS else ("fp16",))
    )
    assert [name for name, times in counted.items() if times > 1] == []


@pytest.mark.parametrize("recipe", ONE_NAME)
def test_what_shares_a_name_is_the_same_run(composed, recipe):
    one, other = (composed(NEWEST, f"{name} fp16") for name in ("sanity_grpo", recipe))
    assert one[NAME] == other[NAME]
    assert set(different(one, other)) == set()


def uneven(config: Composed) -> list[str]:
    """What of the batches does not divide or does not fit."""
    ranks = config["trainer.nnodes"] * config["trainer.n_gpus_per_node"]
    questions, mini = config["data.train_batch_size"], config["actor_rollout_ref.actor.ppo_mini_batch_size"]
    answers = config["actor_rollout_ref.rollout.n"]
    length = config["data.max_prompt_length"] + config["data.max_response_length"]
    parallel = config["actor_rollout_ref.rollout.tensor_model_parallel_size"]
    room = config["actor_rollout_ref.rollout.max_model_len"]
    batched = config["actor_rollout_ref.rollout.max_num_batched_tokens"]
    wrong = {
        "a step's answers on the ranks": questions * answers % ranks,
        "a mini-batch's answers on the ranks": mini * answers % ranks,
        "a step's questions in mini-batches": questions % mini,
        "ranks in vLLMs": ranks % parallel,
        "an answer in vLLM": room < length,
        "an answer in vLLM's batch": batched < room and not config["actor_rollout_ref.rollout.enable_chunked_prefill"],
    }
    roles = ["actor_rollout_ref.actor", *(["critic"] if config["algorithm.adv_estimator"] == "gae" else [])]
    for role in roles:
        if config[f"{role}.use_dynamic_bsz"]:
            wrong[f"an answer in a micro-batch of {role}"] = config[f"{role}.ppo_max_token_len_per_gpu"] < length
        else:
            micro = config[f"{role}.ppo_micro_batch_size_per_gpu"]
            wrong[f"a rank's mini-batch in micro-batches of {role}"] = mini * answers // ranks % micro
        wrong[f"the mini-batch of {role}"] = config[f"{role}.ppo_mini_batch_size"] != mini
    if config["reward.reward_manager.name"] == "dapo":
        penalised = config["reward.reward_kwargs.overlong_buffer_cfg.len"]
        wrong["an answer without a penalty"] = penalised >= config["data.max_response_length"]
    return [what for what, is_wrong in wrong.items() if is_wrong]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("case", (*(f"{name} fp16" for name in NAMES), *SCALED))
def test_batches_come_out_even_and_answers_fit(composed, release, case):
    assert uneven(composed(release, case)) == []


def test_batches_that_do_not_are_found(composed):
    """The check can fail."""
    config = composed(NEWEST, "dapo_14b fp16")
    planted = {
        "data.train_batch_size": 500,
        "trainer.n_gpus_per_node": 6,
        "actor_rollout_ref.rollout.max_model_len": 20480,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 22527,
        "reward.reward_kwargs.overlong_buffer_cfg.len": 20480,
    }
    assert uneven(Composed({**config.values, **planted}, [], None)) == [
        "a step's answers on the ranks",
        "a mini-batch's answers on the ranks",
        "a step's questions in mini-batches",
        "ranks in vLLMs",
        "an answer in vLLM",
        "an answer in a micro-batch of actor_rollout_ref.actor",
        "an answer without a penalty",
    ]


@pytest.mark.parametrize("case", (*(f"{name} fp16" for name in NAMES), *SCALED))
def test_verls_own_check_passes_it(composed, case):
    assert composed(NEWEST, case).refusal is None
