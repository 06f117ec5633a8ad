"""What is evaluated is what was rolled out: a run's exports answer as its rollout did, in the rollout's dtype."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from trainer import Run, train

from verl_fp16.export import MARK
from verl_fp16.quickstart.task import write_parquet

# Enough of both that BF16, too, has its chance to answer otherwise.
ANSWER_TOKENS, PROMPTS = 24, 48


class Answers(NamedTuple):
    """What vLLM answered, and in which dtype it ran."""

    dtype: str
    answers: list[tuple[str, str]]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("export")
    write_parquet(folder / "data", seed=1, train_rows=256, held_out_pairs=PROMPTS)
    done = train(
        folder,
        tiny_model,
        "trainer.save_freq=2",
        "trainer.test_freq=2",
        "trainer.validation_data_dir=${quickstart_dir}/validations",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        f"data.max_response_length={ANSWER_TOKENS}",
        "actor_rollout_ref.rollout.val_kwargs.do_sample=false",
        "actor_rollout_ref.rollout.val_kwargs.temperature=0",
        "actor_rollout_ref.rollout.max_num_seqs=1",
        "actor_rollout_ref.rollout.enable_prefix_caching=false",
        # Large enough to be seen in a random model.
        "actor_rollout_ref.actor.optim.lr=1e-3",
    )
    assert done.result.ok, done.result.cause
    return done


@pytest.fixture(scope="module")
def rolled_out(run) -> list[tuple[str, str]]:
    """(prompt, greedy answer) of the validation after the last step."""
    lines = (run.folder / "validations" / "2.jsonl").read_text().splitlines()
    return sorted((row["input"], row["output"]) for row in map(json.loads, lines))


def checkpoint(run: Run) -> Path:
    return run.folder / "checkpoints" / "global_step_2" / "actor"


def child(*command: object, env: dict[str, str] | None = None) -> None:
    """Run a program of its own in the CPU room."""
    environment = {
        **os.environ,
        "VERL_PLATFORM": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        **(env or {}),
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def merged(run: Run, name: str, env: dict[str, str] | None = None) -> Path:
    target = run.folder / name
    arguments = ("merge", "--backend", "fsdp", "--local_dir", checkpoint(run), "--target_dir", target)
    child("-m", "verl.model_merger", *arguments, env=env)
    return target


def answers_of(model: Path, run: Run) -> Answers:
    rows, out = run.folder / "data" / "validation.parquet", model.with_name(f"{model.name}-answers.json")
    child(Path(__file__).with_name("greedy.py"), model, rows, ANSWER_TOKENS, out)
    found = json.loads(out.read_text())
    return Answers(found["dtype"], sorted(map(tuple, found["answers"])))


def test_the_rollout_says_something(rolled_out):
    assert len({prompt for prompt, _ in rolled_out}) == PROMPTS
    assert len({answer for _, answer in rolled_out}) > PROMPTS // 2


def test_the_export_answers_as_the_rollout_did(run, rolled_out):
    assert json.loads((checkpoint(run) / MARK).read_text()) == {"dtype": "float16", "on_overflow": "error"}
    found = answers_of(checkpoint(run) / "huggingface", run)
    assert found.dtype == "torch.float16"
    assert found.answers == rolled_out


def test_the_merged_model_answers_as_the_rollout_did(run, rolled_out):
    model = merged(run, "merged")
    exported = checkpoint(run) / "huggingface"
    assert (model / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    found = answers_of(model, run)
    assert found.dtype == "torch.float16"
    assert found.answers == rolled_out


def test_what_stock_verl_merges_answers_otherwise(run, rolled_out):
    """Else the tests above would have passed with any export."""
    found = answers_of(merged(run, "stock", env={"VERL_FP16_DISABLE": "1"}), run)
    assert found.dtype == "torch.bfloat16"
    assert [prompt for prompt, _ in found.answers] == [prompt for prompt, _ in rolled_out]
    assert found.answers != rolled_out
