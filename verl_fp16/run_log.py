"""The lines of a training run's log that say why it failed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

_TAIL_BYTES = 1 << 20
_LINE_CHARS = 300

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_SOURCE = re.compile(r"^\(([\w:.<>]+)(?: pid=\d+)?[^)]*\)\s?")
_NOISE = re.compile(r"\s*\[repeated \d+x across cluster\].*|\b\w+ ID: [0-9a-f]{16,}\s?|\s*\(Ray deduplicates logs.*")
_HARMLESS = re.compile(r"^(?:[\[(]?[\d:,. T/-]{8,}[\])]?[ -]*)?(?:DEBUG|INFO|WARNING)\b|^\S+:\d+: \w*Warning: ")
# A line of the configuration that verl prints before it starts: 'key': value, or a value that goes on.
_CONFIGURATION = re.compile(r"^[{\[]*'[^']*'(?::|[,\]}]+$)")
_TRACEBACK, _IGNORED = "Traceback (most recent call last)", "Exception ignored in"
_DIED = re.compile(r"(?:is|are|was) dead|\bdied\b|(?:Died|Dead|Unavailable|Crashed)Error")
_LOG_HEAD = re.compile(r"^(?:ERROR|CRITICAL)\b[^\]]{0,80}\]\s*")
_EXCEPTION = r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Stopped)(?:\([\w.]+\))?(?::|$)"
_RAISED = re.compile(_EXCEPTION)
_TELLING = re.compile(
    rf"{_EXCEPTION}"
    r"|CUDA (?:error|out of memory|driver)|device-side assert|NCCL (?:error|failure)|[Oo]ut of memory|OOM[- ]?kill"
    r"|(?:actor|worker) (?:is dead|died)|[Tt]he actor .*died|node (?:is dead|died)|EngineDeadError"
    r"|Fatal Python error|Segmentation fault|Bus error|core dumped|^Killed|No space left on device"
)


def telling_lines(
    log_path: str | os.PathLike[str], n: int = 8, *, since: int = 0, errors_only: bool = False
) -> list[str]:
    """Return the lines of a log that say most about a failure, in their order, shortened and without repeats.

    Args:
        log_path: a text log; only its last megabyte is read, and a missing one counts as empty.
        n: most lines to return. Of more, the first and the last ones are taken: the first exception is the reason,
            the last is what ended the command. Without any error line, the log's last lines are returned.
        since: the byte from which on the log is read.
        errors_only: whether without any error line none is returned.

    Returns:
        At most `n` lines of at most 300 characters.
    """
    telling: dict[str, str] = {}
    last: list[str] = []
    for source, line in _lines(log_path, since):
        line = _LOG_HEAD.sub("", line)
        if not line or _HARMLESS.match(line) or _CONFIGURATION.match(line):
            continue
        shown = _shortened(f"{source}: {line}" if source else line)
        last = [*last, shown][-n:]
        if _TELLING.search(line):
            telling.setdefault(re.sub(r"0x[0-9a-f]+|\d+", "#", line), shown)
    lines = list(telling.values()) or ([] if errors_only else last)
    return lines if len(lines) <= n else lines[: n // 2] + lines[len(lines) - (n - n // 2) :]


def last_error(log_path: str | os.PathLike[str]) -> str | None:
    """The line of the exception that the command itself was ended by, and not one of its workers; None without one."""
    error, within, ignored = None, False, False
    for source, line in _lines(log_path):
        if source:
            continue
        ignored = ignored or line.startswith(_IGNORED)
        within = within or line.startswith(_TRACEBACK)
        if within and _RAISED.match(line):
            error = error if ignored else _shortened(line)
            within, ignored = not ignored, False
    return error


def tells_of_death(error: str) -> bool:
    """Whether an exception says that another process of the run is gone."""
    return _DIED.search(error) is not None


def _lines(log_path: str | os.PathLike[str], since: int = 0) -> Iterator[tuple[str, str]]:
    """Who wrote a line, "" for the command itself, and the line; from a byte on, of the last megabyte, no empty one."""
    try:
        with open(log_path, "rb") as log:
            log.seek(max(since, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
            text = log.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return
    for raw in _ANSI.sub("", text).splitlines():
        source = _SOURCE.match(raw)
        line = _NOISE.sub("", raw[source.end() :] if source else raw).strip()
        if line:
            yield source.group(1) if source else "", line


def _shortened(line: str) -> str:
    return line if len(line) <= _LINE_CHARS else line[: _LINE_CHARS - 3] + "..."
