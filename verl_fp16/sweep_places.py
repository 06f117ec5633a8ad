"""Where the runs of a sweep write to: two of them in one place, and the second takes away what the first left.

Knows the settings of verl that name such places; of another program's configuration, what has none of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_fp16.refusal import Refused

_FOLDERS = {
    "trainer.default_local_dir": "checkpoints and evidence",
    "trainer.rollout_data_dir": "answers",
    "trainer.validation_data_dir": "answers of the validation",
}
_NAME_THEM = (
    "Name them after what is swept, such as 'trainer.experiment_name=lr-${actor_rollout_ref.actor.optim.lr}' for the "
    "learning rate, and let the name be a part of every such folder"
)


@dataclass(frozen=True)
class Place:
    """A file or folder that a run calls its own.

    Args:
        kind: what it is for; only places of one kind are compared.
        path: absolute, without links.
        told: the setting that names it, for messages.
        way_out: what gives each run one of its own.
    """

    kind: str
    path: str
    told: str
    way_out: str = _NAME_THEM


def places_of(config: Any, folder: str, environment: Mapping[str, str]) -> tuple[Place, ...]:
    """Where one run writes to.

    Args:
        config: the run's configuration with Hydra's own in it, of verl or of any program.
        folder: Hydra's folder of the run.
        environment: the environment variables that the run starts with.
    """
    return tuple(_places(config, folder, environment))


def _places(config: Any, folder: str, environment: Mapping[str, str]) -> Iterator[Place]:
    way_out = "Leave hydra.sweep.subdir out, or make it of the run's number: 'hydra.sweep.subdir=${hydra.job.num}'"
    yield Place("hydra's files", os.path.realpath(folder), f"hydra.sweep.subdir -> {folder}", way_out)
    working = folder if _value(config, "hydra.job.chdir") is True else "."
    for key, kind in _FOLDERS.items():
        path = _value(config, key)
        if isinstance(path, str) and path:
            yield Place(kind, _absolute(path, working), f"{key}={path}")
    yield from _logs(config, working, environment)


def _logs(config: Any, working: str, environment: Mapping[str, str]) -> Iterator[Place]:
    """As verl's ``FileLogger`` and ``_TensorboardAdapter`` name them."""
    loggers, project, name = (_value(config, f"trainer.{key}") for key in ("logger", "project_name", "experiment_name"))
    if not isinstance(loggers, Sequence) or project is None or name is None:
        return
    loggers = [loggers] if isinstance(loggers, str) else loggers
    root = os.path.expanduser(environment.get("VERL_FILE_LOGGER_ROOT", "."))
    for logger, variable, path in (
        ("file", "VERL_FILE_LOGGER_PATH", os.path.join(root, str(project), f"{name}.jsonl")),
        ("tensorboard", "TENSORBOARD_DIR", os.path.join("tensorboard_log", str(project), str(name))),
    ):
        given = environment.get(variable)
        if logger not in loggers or (given is not None and _is_no_file(given)):
            continue
        told = f"trainer.logger={logger} -> {given or path}"
        way_out = _NAME_THEM if given is None else f"Unset {variable}, which is one for all runs"
        yield Place(f"metrics ({logger})", _absolute(path if given is None else given, working), told, way_out)


def _is_no_file(path: str) -> bool:
    """A terminal or a pipe, in which nothing is written over."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _absolute(path: str, working: str) -> str:
    if "://" in path:
        return path.rstrip("/")
    return os.path.realpath(os.path.join(working, path))


def _value(config: Any, key: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:  # the run itself tells what is wrong with it
        return None


def refuse_shared(told: Sequence[str], places: Sequence[Sequence[Place]]) -> None:
    """
    Args:
        told: of each run, for the message.
        places: of each run, from :func:`places_of`.

    Raises:
        Refused: two runs have a place in common; all places of the first such pair are named.
    """
    first: dict[tuple[str, str], str] = {}
    for label, own in zip(told, places, strict=True):
        taken = [(first[place.kind, place.path], place) for place in own if (place.kind, place.path) in first]
        if taken:
            other = taken[0][0]
            shared = [place for owner, place in taken if owner == other]
            listed = "; ".join(f"their {place.kind} ({place.told})" for place in shared)
            fixes = ". ".join(dict.fromkeys(place.way_out for place in shared))
            raise Refused(
                f"verl_fp16: the runs {other} and {label} would share {listed}. The second would go on from what the "
                f"first left or write over it. {fixes}"
            )
        first.update({(place.kind, place.path): label for place in own})
