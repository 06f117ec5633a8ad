"""``python -m verl_fp16.quickstart``: a base model, then verl's own GRPO trainer on it, on a machine without a GPU."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from verl_fp16.leftovers import ray_temp_dir
from verl_fp16.quickstart import report
from verl_fp16.quickstart.progress import RunDisplay
from verl_fp16.refusal import GuardError
from verl_fp16.supervise import RunResult, run_supervised

RECIPE = "quickstart"
FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130

# What a run takes on 2 cores, for the time left until steps have been measured.
_START_UP_S, _STEP_S, _VALIDATION_S = 130, 6, 9
_STALL_S = 300


class WrongInput(ValueError):
    """An option or an override that cannot work; the message names it and says what to do."""


@dataclass(frozen=True)
class Plan:
    """What is run: read back from the configuration that verl's launcher will compose."""

    precision: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    steps: int
    validations: int

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / "verl.log"

    @property
    def estimate_s(self) -> float:
        return _START_UP_S + self.steps * _STEP_S + self.validations * _VALIDATION_S


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the quickstart; returns the exit code (0 done, 1 failed, 2 wrong input, 130 interrupted)."""
    try:
        return _run(_parse(arguments), Console())
    except KeyboardInterrupt:
        print("quickstart: interrupted; everything that was started has been ended", file=sys.stderr)
        return INTERRUPTED
    except (WrongInput, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return WRONG_INPUT


def _run(options: argparse.Namespace, console: Console) -> int:
    plan = make_plan(options.precision, options.seed, options.output, options.overrides)
    started = time.monotonic()
    from verl_fp16.quickstart.base_model import BaseAccuracyError

    try:
        base = make_base(plan, console)
    except BaseAccuracyError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return FAILED
    result = train(plan, console)
    return finish(plan, base, result, time.monotonic() - started, console)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("verl_fp16.quickstart", description=__doc__)
    parser.add_argument("--precision", default="fp16", help="a name of the group precision (default: fp16)")
    parser.add_argument("--seed", type=int, default=1, help="seed of base model, data and sampling (default: 1)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for what is made; replaces an earlier run's results (default: outputs/quickstart...)",
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, passed on to verl; also from $OVERRIDES")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**32:
        parser.error(f"argument --seed: must be between 0 and {2**32 - 1}, got {options.seed}")
    try:
        options.overrides += shlex.split(os.environ.get("OVERRIDES", ""))
    except ValueError as error:
        parser.error(f"$OVERRIDES: {error}")
    return options


def make_plan(precision: str, seed: int, output: Path | None, overrides: Sequence[str]) -> Plan:
    """Compose the configuration as verl's launcher will, so that a wrong override ends the run before it starts.

    Raises:
        WrongInput: naming the option or key.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    suffix = ("" if precision == "fp16" else f"-{precision}") + ("" if seed == 1 else f"-seed{seed}")
    folder = (output or Path("outputs") / f"quickstart{suffix}").resolve()
    mine = {
        "precision": precision,
        "quickstart_dir": _quoted(folder),
        "data.seed": seed,
        "actor_rollout_ref.rollout.seed": seed,
        "hydra.run.dir": _quoted(folder / "hydra"),
    }
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in mine:
            option = {
                "precision": "--precision (PRECISION=...)",
                "quickstart_dir": "--output",
                "hydra.run.dir": "--output",
            }
            raise WrongInput(f"{key} is not to be overridden here: use {option.get(key, '--seed (SEED=...)')}")
    everything = (*(f"{key}={value}" for key, value in mine.items()), *overrides)
    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose(RECIPE, overrides=list(everything))
        return Plan(precision, seed, folder, everything, *_check(config))
    except GuardError as error:
        raise WrongInput(str(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise WrongInput(" ".join(str(error).split())) from None


def _quoted(path: Path) -> str:
    """A path as a value of Hydra's override grammar.

    Raises:
        WrongInput: the path has a character that cannot be written there.
    """
    text = str(path)
    if "\\" in text or "${" in text or "\n" in text:
        raise WrongInput(f"the folder {text!r} has a character that Hydra cannot take: choose another with --output")
    return "'" + text.replace("'", "\\'") + "'"


def _check(config: Any) -> tuple[int, int]:
    """Training steps and validations of the composed configuration.

    Raises:
        WrongInput: a value that the run, its display or its report cannot do with.
        GuardError: settings that contradict the precision.
    """
    import verl  # noqa: F401  loads the plugin, whose resolver the flag's values need
    from omegaconf import OmegaConf

    from verl_fp16.hooks.driver import guard_start

    guard_start(config)
    OmegaConf.to_container(config, resolve=True)
    trainer = config.trainer
    steps, test_freq = trainer.total_training_steps, trainer.test_freq
    if not isinstance(steps, int) or steps < 1:
        raise WrongInput(f"trainer.total_training_steps must be an integer of at least 1, got {steps!r}")
    if not isinstance(test_freq, int) or test_freq == 0:
        raise WrongInput(f"trainer.test_freq must be an integer, -1 for no validation, got {test_freq!r}")
    if not isinstance(trainer.get("val_before_train"), bool):
        raise WrongInput(f"trainer.val_before_train must be true or false, got {trainer.get('val_before_train')!r}")
    loggers = [trainer.logger] if isinstance(trainer.logger, str) else list(trainer.logger or ())
    if "file" not in loggers:
        raise WrongInput(f"trainer.logger must name 'file', which the display and the report read, got {loggers}")
    return steps, int(trainer.val_before_train) + (-(-steps // test_freq) if test_freq > 0 else 0)


def make_base(plan: Plan, console: Console) -> dict:
    """Stage 1: data, tokenizer and base model in ``plan.folder``; returns the base model's report."""
    from transformers.utils import logging as transformers_logging

    from verl_fp16.quickstart import base_model, task

    transformers_logging.disable_progress_bar()  # one for a file of 5 MB, in the middle of ours
    for name in ("metrics.jsonl", "verl.log", "summary.json", "training.png"):
        # What an earlier run left must not be taken for this one's.
        with contextlib.suppress(FileNotFoundError):
            (plan.folder / name).unlink()
    task.write_parquet(plan.folder / "data", plan.seed)
    columns = (
        TextColumn("1/3 base model"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    if not console.is_terminal:
        console.print("[1/3 base model] training", highlight=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task("", total=None, loss="-")
        made = base_model.train_base_model(
            plan.folder / "model",
            plan.seed,
            progress=lambda step, total, loss: bar.update(row, completed=step, total=total, loss=f"{loss:.3f}"),
        )
    console.print(
        f"[1/3 base model] {made.parameters / 1e6:.1f} M parameters, {made.seconds:.0f} s: right on "
        f"{made.sampled_accuracy:.0%} of held-out sums (sampled), {made.greedy_accuracy:.0%} (greedy)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return asdict(made)


def train(plan: Plan, console: Console) -> RunResult:
    """Stages 2 and 3: verl's trainer, supervised."""
    with ray_temp_dir() as ray_dir:
        command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", RECIPE, *plan.overrides]
        command.append(f"+ray_kwargs.ray_init._temp_dir={_quoted(ray_dir)}")
        env = {
            **os.environ,
            "VERL_FILE_LOGGER_PATH": str(plan.metrics),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        display = RunDisplay(
            plan.metrics,
            plan.steps,
            stage="2/3 starting verl: Ray, FSDP2, vLLM",
            training_stage="3/3 GRPO",
            estimate_s=plan.estimate_s,
            title=f"verl GRPO, {plan.precision}",
            console=console,
        )
        with display:
            return run_supervised(
                command,
                log_path=plan.log,
                env=env,
                timeout_s=max(3600, 5 * plan.estimate_s),
                stall_timeout_s=_STALL_S,
                heartbeat_paths=[plan.metrics],
                on_tick=display.tick,
            )


def finish(plan: Plan, base: dict, result: RunResult, seconds: float, console: Console) -> int:
    """Write ``summary.json`` and ``training.png`` and print the table; returns the exit code."""
    from verl_fp16.quickstart.task import HELD_OUT_PAIRS

    metrics = report.read_metrics(plan.metrics)
    summary = {
        "precision": plan.precision,
        "seed": plan.seed,
        "completed": result.ok,
        "cause": result.cause,
        **report.summarise(
            metrics,
            n_validation=HELD_OUT_PAIRS,
            seconds=seconds,
            log_prob_key="mismatch/log_prob_abs_diff_mean",
        ),
        "base_model": base,
        "overrides": list(plan.overrides),
    }
    report.write_summary(plan.folder / "summary.json", summary)
    if not result.ok:
        console.print(f"quickstart failed: {result.cause}", markup=False, style="red", soft_wrap=True)
        console.print(f"the whole log: {result.log_path}", markup=False, soft_wrap=True)
        return FAILED
    if summary["steps"] != plan.steps:
        console.print(
            f"quickstart failed: verl logged {summary['steps']} of {plan.steps} steps and ended without an error; see "
            f"{result.log_path}",
            markup=False,
            soft_wrap=True,
        )
        return FAILED
    picture = report.draw(metrics, plan.folder / "training.png", f"verl GRPO on sums, {plan.precision}")
    console.print(report.table(summary, title=f"quickstart, {plan.precision}, seed {plan.seed}"))
    for what, path in (("picture", picture), ("metrics", plan.metrics), ("log", plan.log)):
        console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
