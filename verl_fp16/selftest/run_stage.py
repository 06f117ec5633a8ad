"""A short GRPO run through verl's own launcher, with the real vLLM rollout."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_fp16.installed import find_verl
from verl_fp16.launch import plan_launch
from verl_fp16.leftovers import ray_temp_dir
from verl_fp16.quickstart.report import read_metrics
from verl_fp16.readback.table import FILE as READ_BACK
from verl_fp16.recipe_files import Recipe
from verl_fp16.selftest.plan import STEPS
from verl_fp16.skip_records import file_of
from verl_fp16.supervise import run_supervised

_PROMPTS, _ANSWERS = 16, 8
_ANSWER_TOKENS = {"small": 8, "theirs": 32}
_STALL_S = 240.0
LOG = "run-verl.log"
# What is judged of a step.
_KEPT = ("mismatch/", "sync/", "actor/skipped", "actor/loss_scale", "actor/grad_norm", "critic/score/mean")


def run(spec: dict[str, Any], tell: Callable[[str], object]) -> dict[str, Any]:
    """Facts: ``cause`` (why it failed, or None), ``steps`` (the metrics of each logged one), ``read_back`` and
    ``skips`` (records of skipped updates); ``gpus``; ``theirs``, whether it was the user's model.

    Args:
        spec: ``output``, ``device``, ``gpus``, ``model`` (the user's, or None), ``longest`` (tokens of a prompt),
            ``tensor_parallel`` (GPUs of a rollout), ``timeout_s``.
        tell: is told what is under way.
    """
    output = Path(spec["output"])
    folder, metrics = output / "run", output / "run" / "metrics.jsonl"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tell("starting verl: Ray, FSDP2, vLLM")
    told = [0]

    def tick() -> None:
        done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if done > told[0]:
            told[0] = done
            tell(f"step {done} of {STEPS}")

    # verl's own configuration, with the groups that the recipes are made of.
    verl = find_verl()
    recipe = Recipe("ppo_trainer", verl.config_dir / "ppo_trainer.yaml", shipped=True)
    with ray_temp_dir() as ray_dir:
        launch = plan_launch(recipe, overrides(spec, folder, str(ray_dir)), verl, os.environ)
        environment = {"VERL_FILE_LOGGER_PATH": str(metrics), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        result = run_supervised(
            launch.command,
            log_path=output / LOG,
            env={**os.environ, **environment, **launch.environment, "RAY_USAGE_STATS_ENABLED": "0"},
            timeout_s=spec["timeout_s"],
            stall_timeout_s=_STALL_S,
            heartbeat_paths=[metrics],
            on_tick=tick,
        )
    steps = [entry for entry in read_metrics(metrics) if entry.trained]
    return {
        "cause": result.cause,
        "gpus": spec["gpus"],
        "theirs": spec["model"] is not None,
        "steps": {str(entry.step): _kept(entry.data) for entry in steps},
        "read_back": _read_json(folder / "checkpoints" / READ_BACK),
        "skips": _lines(file_of(folder / "checkpoints", "actor")),
    }


def overrides(spec: dict[str, Any], folder: Path, ray_dir: str) -> list[str]:
    """Hydra's arguments: FP16, GRPO on written sums, on a GPU of each rank or on the CPU."""
    gpu, theirs, gpus = spec["device"] == "gpu", spec["model"] is not None, spec["gpus"]
    answer = _ANSWER_TOKENS["theirs" if theirs else "small"]
    prompt = max(16, spec["longest"])
    places = {
        "quickstart_dir": spec["output"],
        "trainer.default_local_dir": folder / "checkpoints",
        "hydra.run.dir": folder / "hydra",
        "+ray_kwargs.ray_init._temp_dir": ray_dir,
        **({"actor_rollout_ref.model.path": spec["model"]} if theirs else {}),
    }
    chosen = [
        "+precision=fp16",
        "+scale=gpus_1" if gpu else "+hardware=cpu",
        "+task=sums",
        "+algo=grpo",
        *(f"{key}={quoted(value)}" for key, value in places.items()),
        # The first sync goes as it is trained; only the later ones go in float16.
        "verl_fp16.sync.audit_interval=1",
        f"trainer.n_gpus_per_node={gpus}",
        f"trainer.total_training_steps={STEPS}",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        f"data.train_batch_size={_PROMPTS * gpus}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={_PROMPTS * gpus}",
        f"actor_rollout_ref.rollout.n={_ANSWERS}",
        f"data.max_prompt_length={prompt}",
        f"data.max_response_length={answer}",
        f"actor_rollout_ref.rollout.max_model_len={max(64, prompt + answer)}",
    ]
    chosen += _places_in_ray(gpus, least=16 if gpu else 12)
    if theirs:
        chosen += _for_their_model(prompt + answer, spec["tensor_parallel"])
    return chosen + (_on_a_gpu() if gpu else [])


def _places_in_ray(gpus: int, least: int) -> list[str]:
    """As many of Ray's places as processes want one, however few cores there are.

    The trainer waits for ever for a process that has no place. verl reserves three for each GPU. Ray begins with a
    worker for each place: on a CPU, which they share with the trainer, there are no more than in its recipes.
    """
    return [
        f"ray_kwargs.ray_init.num_cpus={max(least, 3 * gpus + 8)}",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "reward.num_workers=1",
    ]


def _for_their_model(tokens: int, tensor_parallel: int) -> list[str]:
    """
    Args:
        tokens: of a prompt with its answer.
        tensor_parallel: GPUs that hold one rollout's weights.
    """
    rows = 8
    return [
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={rows}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={rows}",
        f"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu={rows}",
        "actor_rollout_ref.actor.optim.lr=1e-6",
        f"actor_rollout_ref.rollout.max_num_batched_tokens={max(1024, 2 * tokens)}",
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={tensor_parallel}",
    ]


def _on_a_gpu() -> list[str]:
    """What the group of the CPU sets there and no recipe's group sets here."""
    roles = ("actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic")
    chosen = ["actor_rollout_ref.rollout.name=vllm", *(f"{role}.strategy=fsdp2" for role in roles)]
    if not has_flash_attention():
        chosen += [
            "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
            "actor_rollout_ref.model.use_remove_padding=false",
        ]
    return chosen


def has_flash_attention() -> bool:
    """Whether the package is installed that verl's default attention on a GPU needs."""
    return importlib.util.find_spec("flash_attn") is not None


def quoted(value: object) -> str:
    """A path as a value of Hydra's override grammar."""
    return "'" + str(value).replace("'", "\\'") + "'"


def _kept(data: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in data.items() if name.startswith(_KEPT)}


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
