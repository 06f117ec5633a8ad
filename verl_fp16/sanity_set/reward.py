"""What judges an answer: the user's function, as verl's ``custom_reward_function`` takes it, or verl's own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from verl_fp16.made_of import digest
from verl_fp16.sanity_set.errors import SanitySetError
from verl_fp16.sanity_set.questions import Question

VERL = "verl"
_VERLS_SCORES, _VERLS_FUNCTION = "verl.utils.reward_score", "default_compute_score"


class Reward:
    """Makes a number of a question and an answer's text.

    Args:
        named: as ``--reward`` names it.
        identity: changes where the function may have changed.
        function: takes ``data_source``, ``solution_str``, ``ground_truth`` and ``extra_info`` and returns a number, or
            a mapping with ``acc`` or ``score``.
    """

    def __init__(self, named: str, identity: str, function: Callable[..., Any]) -> None:
        self.named, self.identity, self._function = named, identity, function

    def __call__(self, question: Question, text: str) -> float:
        """
        Raises:
            SanitySetError: the function raises, or returns something else; with the row.
        """
        try:
            found = self._found(question, text)
        except Exception as error:  # noqa: BLE001  the user's function raises what it likes
            raise SanitySetError(
                f"--reward {self.named} raised {_told(error)} (row {question.row}, answer {text[:200]!r})"
            ) from error
        return _number(self.named, question, found)

    def check(self, question: Question) -> None:
        """What can be said of a question before anything is sampled; of a user's function, nothing."""

    def _found(self, question: Question, text: str) -> Any:
        return self._function(
            data_source=question.data_source,
            solution_str=text,
            ground_truth=question.ground_truth,
            extra_info=question.extra_info,
        )


class VerlsReward(Reward):
    """verl's own scores, each for the data sources that it names."""

    def __init__(self, identity: str, function: Callable[..., Any]) -> None:
        super().__init__(VERL, identity, function)
        self._known: set[str] = set()

    def check(self, question: Question) -> None:
        """
        Raises:
            SanitySetError: verl has no score for the question's ``data_source``, or that score's module does not load.
        """
        if question.data_source in self._known:
            return
        source = f"data_source {question.data_source!r} (row {question.row})"
        own = "Give a function of your own, as --reward FILE.py:FUNC"
        try:
            self._found(question, "")
        except NotImplementedError:
            raise SanitySetError(f"--reward {VERL}: verl has no score for {source}. {own}") from None
        except ImportError as error:
            raise SanitySetError(
                f"--reward {VERL}: verl's score for {source} does not load: {_told(error)}. Install what it needs, or "
                f"g{own[1:]}"
            ) from error
        except Exception:  # noqa: BLE001  what a score makes of no answer at all says nothing of real ones
            pass
        self._known.add(question.data_source)


def load_reward(named: str) -> Reward:
    """The function ``FILE.py:FUNC``, or verl's own scores for the word ``verl``.

    Raises:
        SanitySetError: there is no such file or function, it does not load, or verl is not installed.
    """
    if named == VERL:
        return _verls()
    file, colon, name = named.rpartition(":")
    if not colon or not file or not name:
        raise SanitySetError(
            f"--reward {named}: it has to be FILE.py:FUNC, such as reward.py:compute_score, or {VERL} for verl's own "
            "scores"
        )
    function = getattr(_load(Path(file)), name, None)
    if not callable(function):
        raise SanitySetError(f"--reward {named}: there is no function {name} in {file}")
    return Reward(named, f"{digest(Path(file))}:{name}", function)


def _verls() -> Reward:
    if importlib.util.find_spec("verl") is None:
        raise SanitySetError(
            f"--reward {VERL}: verl is not installed in this environment. Install it, or give a function of your own, "
            "as --reward FILE.py:FUNC"
        )
    try:
        scores = importlib.import_module(_VERLS_SCORES)
        function = getattr(scores, _VERLS_FUNCTION)
    except (ImportError, AttributeError) as error:
        raise SanitySetError(f"--reward {VERL}: {_VERLS_SCORES} does not load: {_told(error)}") from error
    # Of the whole package: each score is a module of its own. A release may change none of them.
    found = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(scores.__file__).parent.rglob("*.py")):
        found.update(f"{file.name} {digest(file)}".encode())
    return VerlsReward(f"{found.hexdigest()}:{VERL}", function)


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
