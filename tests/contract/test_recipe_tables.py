"""What each recipe runs on and for how long: model, data, machines, micro-batches, steps, and single settings."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from recipe_readers import NAMES, PRECISIONS, RECIPES
from recipe_runs import composed

from verl_fp16 import plugin

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
ON_CPU = tuple(name for name in NAMES if name.startswith("cpu_") or name == "quickstart")
SANITY = ("grpo", "grpo_token_tis", "grpo_seq_mis", "gspo", "pg_seq_is", "pg_seq_tis", "pg_seq_mis", "pg_token_is")
SANITY = (*(f"sanity_{algorithm}" for algorithm in SANITY), "precision_ablation", "two_nodes")
MOE = ("moe_grpo_seq_mis", "moe_grpo_token_tis", "moe_pg_seq_tis")

# The model, its data's folder, GPUs of one vLLM.
RUNS_ON = {
    **dict.fromkeys(SANITY, ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "outputs/data/sanity", 1)),
    **dict.fromkeys(MOE, ("Qwen/Qwen3-30B-A3B-Base", "outputs/data/math", 4)),
    "dapo_14b": ("Qwen/Qwen3-14B-Base", "outputs/data/math", 4),
    "octothinker_grpo": ("OctoThinker/OctoThinker-3B-Hybrid-Base", "outputs/data/math", 1),
    "lora_grpo_token_tis": ("Qwen/Qwen2.5-Math-1.5B", "outputs/data/math", 1),
    "gsm8k_grpo": ("Qwen/Qwen2.5-0.5B-Instruct", "outputs/data/gsm8k", 1),
    "gsm8k_ppo": ("Qwen/Qwen2.5-0.5B-Instruct", "outputs/data/gsm8k", 1),
}
# Answers of full length in a micro-batch, steps, epochs, and steps between two validations.
LASTS = {
    **dict.fromkeys(SANITY, (2, 2000, 10000, 32)),
    **dict.fromkeys(MOE, (1, 200, 10000, 10)),
    "dapo_14b": (1, 100, 10000, 10),
    "octothinker_grpo": (4, 1000, 10000, 50),
    "lora_grpo_token_tis": (4, 1000, 10000, 50),
    "gsm8k_grpo": (10, None, 15, 10),
    "gsm8k_ppo": (10, None, 15, 10),
}
# Steps of which the paper says what is seen there.
SEEN_AT = {"dapo_14b": 80, "lora_grpo_token_tis": 610, "octothinker_grpo": 150}

PAIRS = "fp16,bf16,bf16_train_fp16_rollout,bf16_train_fp32_rollout,fp32"
BEGIN_OF_TEXT = "<|begin_of_text|>"
R1_ON_THINKING = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> tags.\nUser: What is 1+1?\nAssistant: <think>"
)


@pytest.fixture(scope="module", autouse=True)
def verl_with_plugin():
    import verl  # noqa: F401

    plugin.require_active()


def values(name: str, *keys: str) -> tuple[Any, ...]:
    return tuple(OmegaConf.select(composed(name), key, throw_on_missing=True) for key in keys)


def hardware_of_the_page() -> dict[str, str]:
    """The column that says on what a recipe runs; the tables of a CPU's recipes have none."""
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| ([^|]*GPUs?) \| [^|]* \|$", (RECIPES / "README.md").read_text(), re.MULTILINE
    )
    return dict(rows)


def test_the_tables_leave_no_recipe_out():
    with_gpus = set(NAMES) - set(ON_CPU)
    assert set(RUNS_ON) == set(LASTS) == set(hardware_of_the_page()) == with_gpus


@pytest.mark.parametrize("name", RUNS_ON)
def test_the_model_and_its_data(name):
    model, folder, parallel = RUNS_ON[name]
    assert values(name, f"{MODEL}.path", f"{ROLLOUT}.tensor_model_parallel_size") == (model, parallel)
    assert values(name, "data.train_files", "data.val_files") == (f"{folder}/train.parquet", f"{folder}/test.parquet")


@pytest.mark.parametrize("name", ON_CPU)
def test_a_cpu_takes_what_the_quickstart_made(name):
    model = "model-moe" if name == "cpu_moe" else "model"
    assert values(name, f"{MODEL}.path", "data.train_files", "data.val_files") == tuple(
        f"outputs/quickstart/{part}" for part in (model, "data/train.parquet", "data/validation.parquet")
    )
    assert values(name, "trainer.nnodes", f"{ROLLOUT}.tensor_model_parallel_size") == (1, 1)


@pytest.mark.parametrize("name", RUNS_ON)
def test_it_runs_on_what_the_page_says(name):
    nodes, gpus = values(name, "trainer.nnodes", "trainer.n_gpus_per_node")
    told = f"{gpus} GPU{'s' if gpus > 1 else ''}"
    assert hardware_of_the_page()[name] == (told if nodes == 1 else f"{nodes} x {told}")


@pytest.mark.parametrize("name", LASTS)
def test_how_much_at_a_time_and_how_long(name):
    answers, *lasts = LASTS[name]
    tokens, prompt, response = values(
        name, f"{ACTOR}.ppo_max_token_len_per_gpu", "data.max_prompt_length", "data.max_response_length"
    )
    assert tokens // (prompt + response) == answers
    steps = OmegaConf.select(composed(name), "trainer.total_training_steps")
    assert [steps, *values(name, "trainer.total_epochs", "trainer.test_freq")] == lasts


@pytest.mark.parametrize("name", SEEN_AT)
def test_what_the_paper_saw_is_reached_and_validated(name):
    steps, every = values(name, "trainer.total_training_steps", "trainer.test_freq")
    validated = SEEN_AT[name] if name == "dapo_14b" else -(-SEEN_AT[name] // every) * every
    assert validated % every == 0 and validated <= steps


@pytest.mark.parametrize(("name", "rank", "alpha"), (("lora_grpo_token_tis", 32, 64), ("cpu_lora", 8, 16)))
def test_adapters_are_on_every_linear_layer(name, rank, alpha):
    keys = [f"{MODEL}.{key}" for key in ("lora_rank", "lora_alpha", "target_modules", "exclude_modules")]
    assert tuple(OmegaConf.select(composed(name), key) for key in keys) == (rank, alpha, "all-linear", None)


def test_the_ablation_sweeps_all_five_pairs():
    with initialize_config_module("verl.trainer.config", version_base=None):
        hydra = compose("precision_ablation", return_hydra_config=True).hydra
    assert OmegaConf.to_container(hydra.sweeper.params) == {"precision": PAIRS}
    assert set(PAIRS.split(",")) == set(PRECISIONS)
    assert hydra.mode.name == "MULTIRUN"
    assert hydra.launcher._target_.endswith(".VerlFp16ProcessLauncher")


def test_the_template_asks_as_the_paper_s_scripts_do():
    """Rendered as a tokenizer does it; what a model begins every text with may stand before it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (template,) = values("octothinker_grpo", f"{MODEL}.custom_chat_template")
    question = {"role": "user", "content": "What is 1+1?"}
    for conversation in ([question], [{"role": "system", "content": "Be brief."}, question]):
        for bos in ({"bos_token": BEGIN_OF_TEXT}, {}):
            rendered, _ = render_jinja_template(
                [conversation], chat_template=template, add_generation_prompt=True, **bos
            )
            assert [text.removeprefix(BEGIN_OF_TEXT) for text in rendered] == [R1_ON_THINKING]


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"octothinker_grpo"}))
def test_no_other_template_is_changed(name):
    assert OmegaConf.select(composed(name), f"{MODEL}.custom_chat_template") is None
