"""Progress where stderr is no terminal: when a line comes, and the time that it says is left."""

from __future__ import annotations

import subprocess
import sys

import pytest

from verl_fp16.cli import progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(progress, "is_terminal", lambda stream: False)
    return Clock


def test_lines_come_now_and_then_with_the_time_left(clock, capsys):
    with progress.stages_shown("sequences") as tell:
        tell("sampling", 20, 120)  # 20 of an earlier run
        clock.now += 60
        tell("sampling", 20, 120)  # loaded
        for done in range(21, 121):
            clock.now += 1
            tell("sampling", done, 120, "43% right")
        tell("sampling", 120, 120)
        tell("scoring", 0, 7)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sampling: 20 of 120 sequences"
    assert lines[1] == "sampling: 30 of 120 sequences, 43% right, about 1:30 left"
    assert lines[2] == "sampling: 40 of 120 sequences, 43% right, about 1:20 left"
    assert lines[-2:] == ["sampling: 120 of 120 sequences, 43% right", "scoring: 0 of 7 sequences"]
    assert len(lines) == 1 + 10 + 1


def test_a_stage_that_was_done_before_says_so_once(clock, capsys):
    with progress.stages_shown("sequences") as tell:
        tell("sampling", 5, 5)
        tell("sampling", 5, 5)
    assert capsys.readouterr().err.splitlines() == ["sampling: 5 of 5 sequences"]


def test_a_bar_on_a_terminal_ends_where_its_stage_does(monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "160")
    with progress.stages_shown("sequences") as tell:
        tell("sampling", 0, 40)
        tell("sampling", 40, 40, "43% right")
    told = capsys.readouterr().err
    assert "sampling" in told and "40/40" in told and "43% right" in told


@pytest.mark.parametrize(("seconds", "told"), ((5, "0:05"), (65.4, "1:05"), (3600, "1:00:00"), (7325, "2:02:05")))
def test_time_is_written_as_a_clock_shows_it(seconds, told):
    assert progress.clock(seconds) == told


def test_what_is_printed_goes_to_the_file_and_progress_to_where_stderr_was(tmp_path):
    code = f"""
import os, subprocess, sys
from pathlib import Path
from verl_fp16.cli.progress import output_goes_to, stages_shown

print("before")
with output_goes_to(Path({str(tmp_path / "log")!r})) as stderr, stages_shown("questions", stderr) as tell:
    tell("sampling", 1, 2)
    print("a line of the library")
    os.write(2, b"another\\n")
    subprocess.run(["sh", "-c", "echo of a child"])
print("after")
print("an error", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["before", "after"]
    assert done.stderr.splitlines() == ["sampling: 1 of 2 questions", "an error"]
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["a line of the library", "another", "of a child"]
