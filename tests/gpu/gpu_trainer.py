"""Runs verl's real trainer on one GPU for a few steps, as ``tests/e2e/trainer.py`` does on a CPU."""

from __future__ import annotations

import os
from pathlib import Path

from gpu_ranks import ROOT

RECIPE = Path(__file__).with_name("sums_gpu.yaml")
VLLM_SAYS = {"CUDA graphs": "Graph capturing finished", "sleep": "Sleep mode freed"}


def overrides_for(folder: Path, model: Path, steps: int) -> tuple[str, ...]:
    """What makes the recipe a short run of ``model`` in ``folder``, with every sync audited."""
    from trainer import SMALL

    return (
        *SMALL,
        f"quickstart_dir={folder}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"hydra.run.dir={folder / 'hydra'}",
        f"actor_rollout_ref.model.path={model}",
        f"critic.model.path={model}",
        f"reward.custom_reward_function.path={ROOT / 'tests' / 'e2e' / 'reward.py'}",
        f"trainer.total_training_steps={steps}",
        "verl_fp16.sync.audit_interval=1",
    )


def train_on_gpu(folder: Path, model: Path, *overrides: str, steps: int = 3, timeout_s: float = 900):
    """Run the recipe beside this file with overrides; returns a ``trainer.Run``."""
    from trainer import Run

    from verl_fp16.installed import find_verl
    from verl_fp16.launch import plan_launch
    from verl_fp16.leftovers import ray_temp_dir
    from verl_fp16.quickstart.report import read_metrics
    from verl_fp16.quickstart.task import write_parquet
    from verl_fp16.recipe_files import find_recipe
    from verl_fp16.supervise import run_supervised

    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(folder / "data", seed=1, train_rows=256, held_out_pairs=16)
    metrics = folder / "metrics.jsonl"
    with ray_temp_dir() as ray_dir:
        settings = [*overrides_for(folder, model, steps), f"+ray_kwargs.ray_init._temp_dir={ray_dir}", *overrides]
        launch = plan_launch(find_recipe(str(RECIPE)), settings, find_verl(), os.environ)
        environment = {
            **os.environ,
            **launch.environment,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "VERL_FILE_LOGGER_PATH": str(metrics),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            # Else verl has vLLM say nothing of its graphs and of its sleep.
            "VLLM_LOGGING_LEVEL": "INFO",
        }
        result = run_supervised(
            launch.command,
            log_path=folder / "verl.log",
            env=environment,
            timeout_s=timeout_s,
            stall_timeout_s=300,
        )
    return Run(result, read_metrics(metrics) if metrics.exists() else [], folder)
