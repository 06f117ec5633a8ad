"""The user's reward function, as verl's ``custom_reward_function`` takes it."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from verl_fp16.sanity_set.errors import SanitySetError
from verl_fp16.sanity_set.questions import Question

Reward = Callable[[Question, str], float]


def load_reward(named: str) -> Reward:
    """The function ``FILE.py:FUNC``, called with verl's arguments.

    Args:
        named: a file and the name of a function in it, which takes ``data_source``, ``solution_str``, ``ground_truth``
            and ``extra_info`` and returns a number, or a mapping with ``acc`` or ``score``.

    Returns:
        What makes a number of a question and an answer's text. It raises :class:`SanitySetError`, with the row, where
        the function raises or returns something else.

    Raises:
        SanitySetError: there is no such file or function, or it does not load.
    """
    file, colon, name = named.rpartition(":")
    if not colon or not file or not name:
        raise SanitySetError(f"--reward {named}: it has to be FILE.py:FUNC, such as reward.py:compute_score")
    function = getattr(_load(Path(file)), name, None)
    if not callable(function):
        raise SanitySetError(f"--reward {named}: there is no function {name} in {file}")

    def reward(question: Question, text: str) -> float:
        try:
            found = function(
                data_source=question.data_source,
                solution_str=text,
                ground_truth=question.ground_truth,
                extra_info=question.extra_info,
            )
        except Exception as error:  # noqa: BLE001  the user's function raises what it likes
            raise SanitySetError(
                f"--reward {named} raised {_told(error)} (row {question.row}, answer {text[:200]!r})"
            ) from error
        return _number(named, question, found)

    return reward


def _load(file: Path) -> ModuleType:
    if not file.is_file():
        raise SanitySetError(f"--reward: there is no file {file}")
    spec = importlib.util.spec_from_file_location("verl_fp16_sanity_set_reward", file)
    if spec is None or spec.loader is None:
        raise SanitySetError(f"--reward {file}: this is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a user's module raises
        raise SanitySetError(f"--reward {file} does not load: {_told(error)}") from error
    return module


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _number(named: str, question: Question, found: Any) -> float:
    value = found.get("acc", found.get("score")) if isinstance(found, Mapping) else found
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise SanitySetError(
            f"--reward {named} returned {found!r} for row {question.row}: it has to be a finite number, or a mapping "
            "with acc or score"
        )
    return number
