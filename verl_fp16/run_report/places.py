"""Which files a run on the command line means: its log, its evidence, its name."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_fp16.log_entries import parse_entry

EVIDENCE_PARTS = (Path("verl_fp16") / "mismatch", Path("verl_fp16") / "read-back.json")
"""One of these is in ``trainer.default_local_dir`` of a run with the precision flag."""

_DEEPEST = 4
_MOST_FOLDERS = 2_000
_FIRST_BYTES = 2**20
_NAME_ONE = "Name verl's file log, a .jsonl (trainer.logger with `file`), or a folder with one in it"
# Logs whose own name says nothing of the run; make quickstart's, and common ones.
_NAMELESS = re.compile(r"(metrics|log|logs|run|train|training|verl)([-_.]?\d+)?", re.IGNORECASE)


class RunError(ValueError):
    """What was named is no run: one line that names the thing, and what to do."""


@dataclass(frozen=True)
class Place:
    """Where a run is.

    Args:
        name: of the run, unlike that of any other.
        log: verl's file log.
        folder: what was named, or the folder of the log.
        evidence: the folder that has ``verl_fp16`` in it, ``trainer.default_local_dir``; None where none was found.
        note: why there is no evidence; "" where there is.
    """

    name: str
    log: Path
    folder: Path
    evidence: Path | None
    note: str


def find_runs(named: Sequence[str], evidence: Sequence[str] = ()) -> list[Place]:
    """What the arguments mean: ``PATH`` or ``NAME=PATH`` each; of evidence, ``NAME=PATH``, or a path for a single run.

    Raises:
        RunError: a path is not there, has no log or several; a name is there twice or is none of a run's.
    """
    given = [split_name(argument) for argument in named]
    logs = [_log_of(Path(path).expanduser()) for _, path in given]
    chosen = [name for name, _ in given]
    names = _unique(chosen, [log for log, _ in logs])
    pointed = _given_evidence(evidence, names)
    places = []
    for name, (log, folder) in zip(names, logs, strict=True):
        if name in pointed:
            places.append(Place(name, log, folder, pointed[name], ""))
        else:
            places.append(Place(name, log, folder, *_evidence_of(name, log, folder)))
    return places


def split_name(argument: str) -> tuple[str | None, str]:
    """Name and path; either may have equals signs, where the path is there."""
    name, equals, path = argument.partition("=")
    if not equals or os.path.lexists(argument):
        return None, argument
    for sign in re.finditer("=", argument):
        if os.path.lexists(os.path.expanduser(argument[sign.end() :])):
            name, path = argument[: sign.start()], argument[sign.end() :]
            break
    if not name.strip() or not path:
        raise RunError(f"{argument}: NAME=PATH lacks the {'path' if name.strip() else 'name'}. {_NAME_ONE}")
    return name.strip(), path


def _log_of(path: Path) -> tuple[Path, Path]:
    """The log that is meant, and the folder of the run."""
    try:
        if path.is_dir():
            return _log_in(path), path
        if path.stat() and not path.is_file():
            raise RunError(f"{path}: this is no file. {_NAME_ONE}")
    except FileNotFoundError:
        raise RunError(f"{path}: there is no such file or folder. {_NAME_ONE}") from None
    except OSError as error:
        raise RunError(f"{path}: it cannot be read ({error.strerror}). {_NAME_ONE}") from None
    return path, path.parent


def _log_in(folder: Path) -> Path:
    """The one log in ``folder``, or, where there is none, in the folders below it."""
    for deepest in (0, _DEEPEST):
        logs = logs_in(folder, deepest)
        if len(logs) == 1:
            return logs[0]
        if logs:
            listed = ", ".join(str(log.relative_to(folder)) for log in logs[:5])
            more = f" and {len(logs) - 5} more" if len(logs) > 5 else ""
            raise RunError(f"{folder}: there are {len(logs)} logs in it: {listed}{more}. Name one of them, or several")
    raise RunError(f"{folder}: there is no log of verl's in it. {_NAME_ONE}")


def logs_in(folder: Path, deepest: int = 0) -> list[Path]:
    """The logs in ``folder`` and so many levels below it.

    Raises:
        RunError: it cannot be listed.
    """
    return sorted(path for path in _files(folder, deepest) if is_log(path))


def _files(folder: Path, deepest: int) -> Iterator[Path]:
    for place in _folders(folder, deepest):
        with os.scandir(place) as entries:
            yield from (Path(entry.path) for entry in entries if entry.name.endswith(".jsonl") and entry.is_file())


def _folders(folder: Path, deepest: int) -> Iterator[Path]:
    """``folder`` and those in it, the nearest first, checkpoints apart; what cannot be listed is passed over.

    Not more than some thousand of them: a run may lie in a folder of everything that somebody has.
    """
    level, left = [folder], _MOST_FOLDERS
    for _ in range(deepest + 1):
        below: list[Path] = []
        for place in level:
            try:
                with os.scandir(place) as entries:
                    inner = sorted(entry.path for entry in entries if _may_hold_runs(entry))
            except OSError as error:
                if place == folder:
                    raise RunError(f"{folder}: it cannot be read ({error.strerror}). {_NAME_ONE}") from None
                continue
            yield place
            below += map(Path, inner)
        level = below[:left]
        left -= len(level)


def _may_hold_runs(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith((".", "global_step_"))


def is_log(path: Path) -> bool:
    """Whether one of the first lines is an entry of verl's file logger."""
    try:
        with open(path, "rb") as file:
            start = file.read(_FIRST_BYTES)
    except OSError:
        return False
    return any(parse_entry(line) for line in start.splitlines())


def _unique(chosen: Sequence[str | None], logs: Sequence[Path]) -> list[str]:
    """The names that were chosen, and for the others their logs' or their folders', told apart where they are alike."""
    for name, times in Counter(filter(None, chosen)).items():
        if times > 1:
            raise RunError(f"{name}: {times} runs have this name. Give each one its own, NAME=PATH")
    parts = [_parts(log) for log in logs]
    taken = set(filter(None, chosen))
    names = list(chosen)
    for depth in range(1, max(map(len, parts)) + 1):
        open_ = [index for index, name in enumerate(names) if name is None]
        tried = {index: "/".join(parts[index][-depth:]) for index in open_}
        often = Counter(tried.values())
        for index, name in tried.items():
            if often[name] == 1 and name not in taken:
                names[index] = name
        taken = set(filter(None, names))
    for index, name in enumerate(names):
        if name is None:  # the same log twice
            base, number = parts[index][-1], 2
            while f"{base} ({number})" in taken:
                number += 1
            names[index] = f"{base} ({number})"
            taken.add(names[index])
    return names


def _parts(log: Path) -> list[str]:
    """What a log is called by, the nearest last: its own name, or its folder's where that says nothing."""
    log = Path(os.path.abspath(log))
    folders = [part for part in log.parent.parts if part != log.anchor]
    return folders if _NAMELESS.fullmatch(log.stem) and folders else [*folders, log.stem]


def _given_evidence(evidence: Sequence[str], names: Sequence[str]) -> Mapping[str, Path]:
    pointed = {}
    for argument in evidence:
        name, equals, path = argument.partition("=")
        if not equals or name not in names:
            if len(names) != 1 or (equals and not os.path.lexists(argument)):
                raise RunError(f"--evidence {argument}: give it as NAME=PATH, where NAME is one of: {', '.join(names)}")
            name, path = names[0], argument
        pointed[name] = _evidence_in(Path(path).expanduser())
    return pointed


def _evidence_in(path: Path) -> Path:
    """The folder with ``verl_fp16`` in it, of one that was named: itself, ``verl_fp16``, or ``mismatch`` in that."""
    for folder in (path, path.parent, path.parent.parent):
        if any((folder / part).exists() for part in EVIDENCE_PARTS):
            return folder
    if not path.exists():
        raise RunError(f"--evidence {path}: there is no such folder. Name trainer.default_local_dir of the run")
    raise RunError(
        f"--evidence {path}: there is no {EVIDENCE_PARTS[0]} in it. Name trainer.default_local_dir of the run"
    )


def _evidence_of(name: str, log: Path, folder: Path) -> tuple[Path | None, str]:
    """The evidence beside a log, and why there is none."""
    # Where verl puts checkpoints by default: checkpoints/<project>/<experiment>, the log being <project>/<experiment>.
    usual = log.parent.parent / "checkpoints" / log.parent.name / log.stem
    found = [usual] if _has_evidence(usual) else [place for place in _folders(folder, _DEEPEST) if _has_evidence(place)]
    if len(found) > 1:
        found = [place for place in found if place.name == log.stem] or found
    if len(found) == 1:
        return found[0], ""
    which = "none was found beside the log" if not found else f"there are {len(found)} folders with some beside the log"
    return None, f"{which}; name the run's trainer.default_local_dir with --evidence '{name}=FOLDER'"


def _has_evidence(folder: Path) -> bool:
    try:
        return any((folder / part).exists() for part in EVIDENCE_PARTS)
    except OSError:
        return False
