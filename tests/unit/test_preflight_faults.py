"""Faults around the command preflight: none of them looks like a verdict, and none is a traceback."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from preflight_models import make_model, preflight, with_weight

from verl_fp16.preflight import weights

COMMAND = f"{shlex.quote(sys.executable)} -m verl_fp16.cli preflight"
TIMEOUT_S = 120


def in_a_shell(line: str) -> subprocess.CompletedProcess[str]:
    """``line`` in bash, where ``preflight`` is the command; the exit code is the command's, whatever it is piped to."""
    script = f'preflight() {{ {COMMAND} "$@" --weights-only; }}; {line}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S)


def told_by(process: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in process.stderr.splitlines() if "reading" not in line]


@pytest.mark.parametrize("reader", ("head -c 10", "true"))
@pytest.mark.parametrize("options", ("", "--json"))
def test_a_reader_that_closes_the_pipe_gets_the_verdict_as_exit_code(reader, options, tmp_path):
    path = make_model(tmp_path / "model", with_weight(7e4))
    process = in_a_shell(f"preflight {path} {options} | {reader}")
    assert (process.returncode, told_by(process)) == (2, [])


@pytest.mark.parametrize("streams", ("2>&1 | true", "2>/dev/full", "2>&-", ">&-"))
def test_where_nothing_can_be_told_the_exit_code_still_is_the_verdict(streams, tmp_path):
    process = in_a_shell(f"preflight {make_model(tmp_path / 'model', with_weight(7e4))} {streams}")
    assert (process.returncode, told_by(process)) == (2, [])


@pytest.mark.parametrize("options", ("", "--json"))
def test_a_full_disk_is_one_line_and_no_verdict(options, tmp_path):
    process = in_a_shell(f"preflight {make_model(tmp_path / 'model')} {options} > /dev/full")
    assert process.returncode == 3
    (line,) = told_by(process)
    assert line.startswith("verl-fp16: the verdict could not be printed: OSError: [Errno 28] No space left on device")


def test_nobody_listens_to_a_refusal():
    assert in_a_shell("preflight not-there --json > /dev/full 2>&1").returncode == 3
    assert in_a_shell("preflight not-there --json >&- 2>&-").returncode == 3


@pytest.mark.parametrize("error", (RuntimeError("a fault\nin two lines"), MemoryError(), BaseException("a panic")))
@pytest.mark.parametrize("options", ((), ("--json",)))
def test_what_nobody_expected_is_one_line_and_no_verdict(error, options, tmp_path, monkeypatch):
    def examine(*arguments):
        raise error

    monkeypatch.setattr(weights, "examine", examine)
    result = preflight(make_model(tmp_path / "model"), *options)
    told = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
    assert result.exit_code == 3
    assert result.stderr.splitlines()[1:] == [f"verl-fp16: there is no verdict: {told}"]
    if options:
        assert json.loads(result.stdout) == {"verdict": None, "error": f"there is no verdict: {told}"}
    else:
        assert result.stdout == ""


def test_ctrl_c_is_130_as_the_help_says(tmp_path):
    assert "130" in preflight(tmp_path, "--help").stdout
    code = (
        "import time\nfrom verl_fp16.preflight import weights\nfrom verl_fp16.cli.app import app\n"
        "weights.examine = lambda *_: (print('here', flush=True), time.sleep(60))\napp()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "preflight", str(make_model(tmp_path / "model")), "--weights-only"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, told.splitlines()[1:]) == (130, ["verl-fp16: interrupted; there is no verdict"])


@pytest.mark.parametrize(
    ("name", "told"),
    (
        ("a" * 300, "File name too long"),
        ("~nobody-of-this-name/model", "there is no such file or folder"),
    ),
)
def test_a_name_that_the_system_refuses(name, told):
    result = preflight(Path(name))
    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"verl-fp16: {name}: ") and told in line
