"""Hydra's launcher ``verl_fp16_processes``: each run of a sweep in a process of its own, one after the other.

With Hydra's basic launcher all runs of a sweep share a process, and with it what the first of them left of Ray, torch
and the hooks. Hydra imports this module in every program of the environment, so it imports nothing but Hydra and
OmegaConf; the work is in :mod:`verl_fp16.process_sweep`.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

NAME = "verl_fp16_processes"


@dataclass
class ProcessLauncherConf:
    _target_: str = "hydra_plugins.verl_fp16_launcher.VerlFp16ProcessLauncher"


ConfigStore.instance().store(group="hydra/launcher", name=NAME, node=ProcessLauncherConf, provider="verl_fp16")


class VerlFp16ProcessLauncher(Launcher):
    """Starts this program once for each run, with the run's overrides; a run that fails keeps none from running."""

    def __init__(self) -> None:
        self._context: HydraContext | None = None
        self._config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """
        Raises:
            Refused: the sweeper hands the runs over in batches.
        """
        from verl_fp16.refusal import Refused

        if config.hydra.sweeper.get("max_batch_size") is not None:
            raise Refused(
                f"verl_fp16: hydra.sweeper.max_batch_size={config.hydra.sweeper.max_batch_size} has no use with "
                f"hydra/launcher={NAME}, where runs follow one another: leave it out"
            )
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """
        Raises:
            Refused: the runs cannot be started from here, or would write into one folder; nothing was started.
            SystemExit: a run failed (1), or a signal ended the sweep (128 and its number).
        """
        from verl_fp16 import process_sweep, sweep_places

        told = process_sweep.what_differs(job_overrides)
        configs, folders, places = [], [], []
        for config in self._configs(job_overrides, initial_job_idx):
            with _answering_from(config):
                folder = os.path.join(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
                places.append(sweep_places.places_of(config, folder, os.environ))
            configs.append(config)
            folders.append(folder)
        sweep_places.refuse_shared(told, places)
        program = process_sweep.this_program(sys.executable, sys.orig_argv, sys.argv)
        # As they were given: an interpolation in them is the run's to resolve.
        shared = OmegaConf.to_container(self._config.hydra.overrides.hydra)
        jobs = []
        for overrides, label, config, folder in zip(job_overrides, told, configs, folders, strict=True):
            command = process_sweep.command(program, shared, overrides, folder, int(config.hydra.job.num))
            jobs.append(process_sweep.Job(label, folder, command))
        process_sweep.run_in_turn(jobs)
        return [JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED) for overrides in job_overrides]

    def _configs(self, job_overrides: Sequence[Sequence[str]], first: int) -> Iterator[DictConfig]:
        """Each run's configuration, with its number in it."""
        for number, overrides in enumerate(job_overrides, first):
            config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = str(number), number
            yield config


@contextlib.contextmanager
def _answering_from(config: DictConfig) -> Iterator[None]:
    """``${hydra:...}`` is answered from one configuration for all, here from this run's."""
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(config)
    try:
        yield
    finally:
        instance.cfg = before
