"""The seam of the driver: what is done once a training step, with everything that verl is about to log of it.

An observer is called after the step's metrics are complete and before they are logged, in verl's v1 trainer and in its
legacy one alike::

    @observe
    def watch(step: StepRecord) -> None:
        step.metrics["mine/value"] = 1.0
        if step.metrics.get("actor/grad_norm", 0) > 100:  # a step without an applied update has none
            step.save_checkpoint()
            step.stop("the gradient norm passed 100")

The module that says so has to be imported in the trainer's process; verl imports what ``actor_rollout_ref.model.
external_lib`` names there (and in every worker, where an observer is never called). Plain Python; the wrap is in
:mod:`verl_fp16.hooks.trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any


class TrainingStopped(RuntimeError):
    """Training was ended on purpose; the message says by whom, at which step and why."""


@dataclass
class StepRecord:
    """One training step, as observers see it.

    Attributes:
        number: the step, counted from 1 over resumed runs, as verl logs it.
        metrics: what verl is about to log; what an observer adds is logged with it.
        trainer: verl's trainer.
    """

    number: int
    metrics: MutableMapping[str, Any]
    trainer: Any
    checkpoint_wanted: bool = field(default=False, init=False)
    stopped_by: list[tuple[str, str]] = field(default_factory=list, init=False)
    _observer: str = field(default="", init=False, repr=False)
    _error: Exception | None = field(default=None, init=False, repr=False)

    def save_checkpoint(self) -> None:
        """Have a checkpoint of this step: written once, after its metrics are logged and before a stop.

        Where verl saved this step itself, that is the checkpoint. Weights and optimizer are those after the step's
        updates, and a run that resumes from it goes on with the next step.
        """
        self.checkpoint_wanted = True

    def stop(self, reason: str) -> None:
        """End the run after this step's metrics are logged, with :class:`TrainingStopped` and a non-zero exit code."""
        self.stopped_by.append((self._observer, reason))

    def raise_if_stopped(self, besides: Exception | None = None) -> None:
        """Raise :class:`TrainingStopped` where an observer stopped the run or failed.

        Args:
            besides: what went wrong while the step was logged or its checkpoint written.
        """
        if self.stopped_by:
            reasons = "; ".join(f"{observer}: {reason}" for observer, reason in self.stopped_by)
            also = f" (and then {type(besides).__name__}: {besides})" if besides else ""
            raise TrainingStopped(f"training was stopped at step {self.number} by {reasons}{also}") from (
                besides or self._error
            )


Observer = Callable[[StepRecord], None]

_observers: dict[str, Observer] = {}


def observe(observer: Observer) -> Observer:
    """Have ``observer`` called with every training step of this process, after those that are registered already.

    One that comes from the same place again (its module was imported anew) takes the former one's place.
    """
    _observers[f"{observer.__module__}.{observer.__qualname__}"] = observer
    return observer


def forget(observer: Observer) -> None:
    """Take ``observer`` out again.

    Raises:
        KeyError: it is not registered.
    """
    del _observers[f"{observer.__module__}.{observer.__qualname__}"]


def notify_observers(step: StepRecord) -> None:
    """Call every observer, in order. One that raises stops the run by its name; the others are still called."""
    for name, observer in list(_observers.items()):
        step._observer = name
        try:
            observer(step)
        except Exception as error:  # noqa: BLE001  whatever it is, it ends the run, after the metrics are logged
            step.stop(f"{type(error).__name__}: {error}")
            step._error = step._error or error
