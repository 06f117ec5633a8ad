"""The final answer in a text: behind ``####`` as in GSM8K, in a box as in MATH."""

from __future__ import annotations

import re

from verl_fp16.data_sets.errors import DataSetError

MARK = "####"
_NUMBER = re.compile(r"\s*\+?(-?)\s*\$?\s*([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(.*)")
_SCALED = re.compile(r"(?:[\s-]*(?:hundred|thousand|million|billion|trillion)s?|\s*k|m)\b", re.IGNORECASE)
"""Directly behind a number; ``5 m`` may be metres, ``5m`` can be anything."""
_END = re.compile(r"(?<!\\)\$|\\\]|\\\)|\n")
_SHOWN = 60
_LONGEST = 300
"""Characters of a final answer that no box marks: what is longer is a worked solution."""


class NoAnswer(DataSetError):
    """There is no final answer in a text, or none that verl's scorer could ever find equal; the message says why."""


def number_behind_mark(text: str) -> str:
    """The number behind the last ``####``, without commas, a plus or a dollar sign, as verl's GSM8K scorer reads it.

    Raises:
        NoAnswer: there is no ``####``, or what stands behind it is not one number, as 1/2, 10:30 and 5 million are
            not: verl's scorer would take 1, 10 and 5 for the answer.
    """
    _, mark, behind = text.rpartition(MARK)
    if not mark:
        raise NoAnswer(f"there is no {MARK} in its answer, {_shown(text)}")
    line = behind.strip().partition("\n")[0]
    found = _NUMBER.fullmatch(line)
    if found is None or _SCALED.match(found[3]) or any(character.isnumeric() for character in found[3]):
        raise NoAnswer(f"what is behind {MARK} is not one number, {_shown(line)}")
    return found[1] + found[2].replace(",", "")


def boxed(text: str) -> str:
    r"""What is in the last ``\boxed{...}``, or in the last ``\fbox{...}`` where nothing is boxed.

    ``\boxed 5`` reaches to the end of its formula or line.

    Raises:
        NoAnswer: there is no box, or it is empty or not closed.
    """
    for command in ("\\boxed", "\\fbox"):
        _, found, behind = text.rpartition(command)
        if found:
            return _content(behind.lstrip(), unbraced=behind[:1].isspace(), command=command)
    raise NoAnswer(f"there is no \\boxed in its solution, {_shown(text)}")


def final_answer(text: str) -> str:
    """A final answer that stands alone, or in a box.

    Raises:
        NoAnswer: as :func:`boxed`; it is empty, a worked solution, or its braces are not balanced, so that verl's
            scorer could not find it in a box.
    """
    if "\\boxed" in text or "\\fbox" in text:
        return boxed(text)
    answer = text.strip()
    if not answer:
        raise NoAnswer("its answer is empty")
    if MARK in answer:
        raise NoAnswer(f"its answer has {MARK}, as GSM8K's have, {_shown(answer)}")
    if len(answer) > _LONGEST:
        raise NoAnswer(f"its answer is no final answer but a text without \\boxed, {_shown(answer)}")
    if _closing(f"{{{answer}}}") != len(answer) + 1:
        raise NoAnswer(f"the braces of its answer are not balanced, {_shown(answer)}")
    return answer


def _content(behind: str, unbraced: bool, command: str) -> str:
    if behind.startswith("{"):
        end = _closing(behind)
        if end is None:
            raise NoAnswer(f"its last {command} is not closed, {_shown(command + behind)}")
        content = behind[1:end].strip()
    elif unbraced:
        content = _END.split(behind, maxsplit=1)[0].strip().rstrip(".,")
        if _closing(f"{{{content}}}") != len(content) + 1:
            raise NoAnswer(f"the braces behind its last {command} are not balanced, {_shown(command + ' ' + behind)}")
    else:
        raise NoAnswer(f"its last {command} has no braces, {_shown(command + behind)}")
    if not content:
        raise NoAnswer(f"its last {command} is empty")
    return content


def _closing(text: str) -> int | None:
    r"""Where the brace that ``text`` begins with is closed. ``\{`` counts too: it does for verl's scorer."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return place
    return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}")
