"""Runs verl's real trainer (Ray, FSDP, vLLM's CPU build) for a few steps and reads what it logged."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from releases import release_environment

from verl_fp16.leftovers import ray_temp_dir
from verl_fp16.quickstart.report import StepMetrics, read_metrics
from verl_fp16.quickstart.task import write_parquet
from verl_fp16.supervise import RunResult, run_supervised

# The quickstart's recipe with a tiny model, 8 prompts with 4 answers, and two updates a step.
SMALL = (
    # Low enough that no update of this model overflows.
    "verl_fp16.loss_scale.init=1024",
    "data.train_batch_size=8",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
)


@dataclass(frozen=True)
class Run:
    """What a run of the trainer left."""

    result: RunResult
    metrics: list[StepMetrics]
    folder: Path

    @property
    def log(self) -> str:
        return self.result.log_path.read_text(errors="replace")

    @property
    def read_back(self) -> dict:
        return json.loads((self.folder / "checkpoints" / "verl_fp16" / "read-back.json").read_text())

    def step(self, number: int) -> dict[str, float]:
        return next(entry.data for entry in self.metrics if entry.step == number)


def train(
    folder: Path,
    model: Path,
    *overrides: str,
    steps: int = 2,
    timeout_s: float = 420,
    on_tick: Callable[[], object] | None = None,
    env: Mapping[str, str] | None = None,
    release: str | None = None,
    recipe: str = "quickstart",
) -> Run:
    """Run ``python -m verl.trainer.main_ppo --config-name quickstart`` with overrides, in ``folder``.

    ``recipe`` is another one of those for a CPU.

    Modules beside this one can be named in ``model.external_lib``. ``release`` is the verl that runs: one of
    :mod:`releases`, or the installed one.
    """
    env = {**(release_environment(release) if release else {}), **(env or {})}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        write_parquet(folder / "data", seed=1, train_rows=256, held_out_pairs=16)
    metrics = folder / f"metrics-{steps}.jsonl"
    with ray_temp_dir() as ray_dir:
        command = [
            *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", recipe),
            *SMALL,
            f"quickstart_dir={folder}",
            f"trainer.default_local_dir={folder / 'checkpoints'}",
            f"hydra.run.dir={folder / 'hydra'}",
            f"actor_rollout_ref.model.path={model}",
            f"critic.model.path={model}",
            f"reward.custom_reward_function.path={Path(__file__).parent / 'reward.py'}",
            f"trainer.total_training_steps={steps}",
            f"+ray_kwargs.ray_init._temp_dir={ray_dir}",
            *overrides,
        ]
        environment = {
            **os.environ,
            "VERL_FILE_LOGGER_PATH": str(metrics),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            **env,
        }
        path = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), path]))
        result = run_supervised(
            command,
            log_path=folder / f"verl-{steps}.log",
            env=environment,
            timeout_s=timeout_s,
            stall_timeout_s=180,
            on_tick=on_tick,
        )
    return Run(result, read_metrics(metrics), folder)
