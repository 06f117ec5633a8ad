"""The file log of a run that resumes: what is kept, dropped and marked, whatever state a crash left it in."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_fp16.file_log import Lines, continue_log, mark

MARK = b'{"step":3,"data":{"verl_fp16/resumed_from_step":3}}\n'


def line(step: int, **data: float) -> bytes:
    return json.dumps({"step": step, "data": data or {"x": step / 2}}, separators=(",", ":")).encode() + b"\n"


def steps(*numbers: int) -> bytes:
    return b"".join(map(line, numbers))


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "run.jsonl"


CASES = {
    "nothing to drop": (steps(0, 1, 3), steps(0, 1, 3), Lines(3, 0, 0)),
    "later steps": (steps(1, 2, 3, 4, 5), steps(1, 2, 3), Lines(3, 2, 0)),
    "only later steps": (steps(4, 5), b"", Lines(0, 2, 0)),
    "later steps between": (steps(1, 9, 2), steps(1, 2), Lines(2, 1, 0)),
    "two lines of a step": (steps(3, 3, 4), steps(3, 3), Lines(2, 1, 0)),
    "empty": (b"", b"", Lines(0, 0, 0)),
    "half a line at the end": (steps(1, 2) + b'{"step":3,"data":{"x', steps(1, 2), Lines(2, 0, 1)),
    "half a line of a later step": (steps(1, 5) + b'{"step":6,"da', steps(1), Lines(1, 1, 1)),
    "half a line and nothing else": (b'{"st', b"", Lines(0, 0, 1)),
    "half a line in the middle": (steps(1) + b'{"step":2,"da' + steps(2, 3), steps(1, 3), Lines(2, 0, 1)),
    "garbage in the middle": (steps(1) + b"\x00\xff\x00\n" + steps(2), steps(1, 2), Lines(2, 0, 1)),
    "brackets without end": (steps(1) + b"[" * 100_000 + b"\n" + steps(2), steps(1, 2), Lines(2, 0, 1)),
    "a number of too many digits": (b'{"step":' + b"1" * 5000 + b"}\n" + steps(2), steps(2), Lines(1, 0, 1)),
    "JSON of somebody else": (b'7\n[]\n{}\n{"step":true}\n{"step":"1"}\nnull\n' + steps(2), steps(2), Lines(1, 0, 6)),
    "an empty line": (steps(1) + b"\n" + steps(2), steps(1, 2), Lines(2, 0, 1)),
    "no newline at the end": (steps(1, 2)[:-1], steps(1, 2), Lines(2, 0, 0)),
    "no newline at the end of a later step": (steps(1, 4)[:-1], steps(1), Lines(1, 1, 0)),
    "an earlier mark": (steps(1) + mark(1) + steps(2, 3), steps(1) + mark(1) + steps(2, 3), Lines(4, 0, 0)),
    "a later mark": (steps(1, 2) + mark(8) + steps(9), steps(1, 2), Lines(2, 2, 0)),
    "verl's null of a nan": (b'{"step":1,"data":{"x":null}}\n', b'{"step":1,"data":{"x":null}}\n', Lines(1, 0, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_dropped_and_marked(log, case):
    before, kept, lines = CASES[case]
    log.write_bytes(before)
    assert continue_log(log, 3) == lines
    assert log.read_bytes() == kept + MARK
    assert [*log.parent.iterdir()] == [log], "nothing is left beside it"


def test_a_missing_file_starts_with_the_mark(log):
    assert continue_log(log, 3) == Lines(0, 0, 0)
    assert log.read_bytes() == MARK


def test_the_same_resume_twice_marks_twice(log):
    log.write_bytes(steps(1, 2, 3, 4))
    continue_log(log, 3)
    assert continue_log(log, 3) == Lines(4, 0, 0)
    assert log.read_bytes() == steps(1, 2, 3) + MARK + MARK


entries = st.one_of(
    st.builds(line, st.integers(0, 9)),
    st.builds(mark, st.integers(0, 9)),
    st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"") + b"\n"),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(entries, max_size=8), st.integers(0, 40), st.integers(1, 9))
def test_any_file_cut_anywhere_keeps_whole_lines_of_its_steps(written, cut, resumed_step):
    """By another account of it: the lines that verl's format has, in their order, and the mark."""
    before = b"".join(written)
    before = before[: len(before) - cut] if cut < len(before) else before
    whole = []
    for raw in before.split(b"\n"):
        try:
            entry = json.loads(raw.decode())
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int and entry["step"] <= resumed_step:
            whole.append(raw + b"\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log")
        path.write_bytes(before)
        lines = continue_log(path, resumed_step)
        after = path.read_bytes()
        assert after == b"".join(whole) + mark(resumed_step)
        assert lines.kept == len(whole)
        assert sum(lines) == before.count(b"\n") + (not before.endswith(b"\n") and before != b"")
        assert continue_log(path, resumed_step) == Lines(len(whole) + 1, 0, 0), "what it leaves is whole"


@pytest.mark.parametrize("last", (3, 4))
def test_permissions_and_links_stay(log, last):
    real = log.parent / "elsewhere" / "real.jsonl"
    real.parent.mkdir()
    real.write_bytes(steps(1, last))
    real.chmod(0o640)
    log.symlink_to(real)
    continue_log(log, 3)
    assert log.is_symlink() and real.read_bytes() == (steps(1, 3) if last == 3 else steps(1)) + MARK
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert [*real.parent.iterdir()] == [real]


def test_a_log_with_nothing_to_drop_is_the_same_file(log):
    log.write_bytes(steps(1, 2))
    before = log.stat().st_ino
    continue_log(log, 3)
    assert log.stat().st_ino == before


@pytest.mark.parametrize("failing", ("replace", "fsync"))
def test_an_error_leaves_the_log_as_it_was(log, monkeypatch, failing):
    def fail(*args):
        raise OSError(errno.ENOSPC, "no space")

    log.write_bytes(steps(1, 4))
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        continue_log(log, 3)
    assert log.read_bytes() == steps(1, 4)
    assert [*log.parent.iterdir()] == [log]


def test_all_is_written_before_the_log_is_replaced(log, monkeypatch):
    """A crash at any time leaves the old log or the new one."""
    seen = {}

    def replace(new, old, true=os.replace):
        seen.update(new=Path(new).read_bytes(), old=Path(old).read_bytes(), folder=Path(new).parent)
        true(new, old)

    log.write_bytes(steps(1, 4))
    monkeypatch.setattr(os, "replace", replace)
    continue_log(log, 3)
    assert seen == {"new": steps(1) + MARK, "old": steps(1, 4), "folder": log.parent}


def test_a_long_log_is_not_held_in_memory(log):
    with log.open("wb") as file:
        for step in range(20_000):
            file.write(line(step, **{f"metric/{i}": 0.5 for i in range(20)}))
    tracemalloc.start()
    try:
        assert continue_log(log, 10_000) == Lines(10_001, 9_999, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20 < log.stat().st_size, peak
