"""The command report: what it prints and writes, and one line for everything that goes wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import alarm, entry, write_evidence, write_log
from typer.testing import CliRunner

from verl_fp16.cli.app import app
from verl_fp16.run_report import assemble, writing

FILES = {"report.html", "report.md", "learning.png", "gap-between-rollout-and-training.png", "updates.png"}


def report(*arguments: object):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def in_a_process(*arguments: object, before: str = "", **options) -> subprocess.CompletedProcess:
    code = f"import sys\n{before}\nfrom verl_fp16.cli.app import app\napp()"
    return subprocess.run([sys.executable, "-c", code, "report", *map(str, arguments)], text=True, **options)


def told(result) -> str:
    """The one line on stderr, without its beginning."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("verl-fp16: ")
    return line.removeprefix("verl-fp16: ")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture
def log(tmp_path) -> Path:
    return write_log(tmp_path / "run" / "metrics.jsonl", range(1, 4), score_mean=lambda step: step / 10)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "report"


def test_what_is_printed_and_written(log, out):
    result = report(log, "-o", out)
    assert (result.exit_code, result.stderr) == (0, "")
    header, *rows = [line.split("\t") for line in result.stdout.splitlines() if "\t" in line]
    assert header == ["metric", "run", "first", "last", "best", "at step"]
    assert ["Reward", "run", "0.1000", "0.3000", "0.3000", "3"] in rows
    assert ["Loss scale", "run", "65,536", "65,536", "-", "-"] in rows
    assert ["Gap, mean |Δ log p|", "run", "4.000e-04", "4.000e-04", "4.000e-04", "1"] in rows
    assert len(rows) == 12
    assert [line for line in result.stdout.splitlines() if "\t" not in line] == [
        "run: note: without evidence: none was found beside the log; name the run's trainer.default_local_dir with "
        "--evidence 'run=FOLDER'",
        "Nothing was found in this run. Looked for: alarms on the gap, values that are not finite, a collapse of the "
        "reward, updates skipped in a row at the end, a log that ends early.",
        f"written: {out}/report.md",
        f"written: {out}/report.html",
    ]
    assert set(files(out)) == FILES


def test_findings_are_printed_with_their_run_and_step(log, out, tmp_path):
    write_evidence(tmp_path / "run" / "checkpoints", 2, alarm(2))
    lines = report(f"mine={log}", "-o", out).stdout.splitlines()
    assert (
        "mine, step 2: alarm: mismatch/k3 is 6e-06 (2e-06 -> 6e-06; the rule is verl_fp16.mismatch.alarm_k3_jump)"
        in (lines)
    )
    assert not any(line.startswith("Nothing was found") for line in lines)


def test_the_table_as_json_is_strict_and_has_what_is_better(log, out, tmp_path):
    other = write_log(tmp_path / "other" / "metrics.jsonl", grad_norm=lambda step: None)
    result = report(log, other, "--json", "-o", out)
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    first, second = found["runs"]
    assert first["metrics"]["reward"] == {
        "metric": "critic/score/mean",
        "unit": "mean of the step's responses",
        "better": "larger",
        "first": {"step": 1, "value": 0.1},
        "last": {"step": 3, "value": 0.3},
        "best": {"step": 3, "value": 0.3},
    }
    assert first["metrics"]["k3"]["better"] == "smaller"
    assert (first["metrics"]["entropy"]["better"], first["metrics"]["entropy"]["best"]) == (None, None)
    assert (second["name"], [finding["kind"] for finding in second["findings"]]) == ("other", ["not finite"])
    assert "grad_norm" not in second["metrics"]
    assert {Path(path).name for path in found["written"]} == FILES


def test_title_and_smoothing_are_in_the_page(tmp_path, out):
    log = write_log(tmp_path / "run" / "metrics.jsonl", range(1, 100))
    assert report(log, "-o", out, "--title", "<The title>", "--smooth", 7).exit_code == 0
    page = (out / "report.html").read_text()
    assert "<title>&lt;The title&gt;</title>" in page and "running median over 7 steps" in page


@pytest.mark.parametrize(
    ("name", "content"), [("missing.jsonl", None), ("empty.jsonl", ""), ("text.jsonl", "text\n"), ("cut.jsonl", '{"st')]
)
def test_a_wrong_run_is_one_line_and_touches_nothing(log, out, tmp_path, name, content):
    out.mkdir()
    (out / "report.html").write_text("old")
    if content is not None:
        (tmp_path / name).write_text(content)
    result = report(log, tmp_path / name, "-o", out)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told(result).startswith(str(tmp_path / name))
    assert files(out) == {"report.html": b"old"}


def test_a_name_that_could_steer_a_terminal_does_not(tmp_path, out):
    log = write_log(tmp_path / "run" / "metrics.jsonl")
    result = report(f"\x1b[31mred\u202e={log}", "-o", out)
    assert result.exit_code == 0 and "\x1b" not in result.stdout and "\u202e" not in result.stdout
    assert "\\x1b[31mred\\u202e" in result.stdout
    assert "\x1b" not in told(report(tmp_path / "\x1b[31mgone", "-o", out))


def test_no_space_left_is_one_line_and_the_table_is_told(log, out, monkeypatch):
    out.mkdir()
    (out / "report.html").write_text("old")

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    result = report(log, "-o", out)
    assert result.exit_code == 1
    assert told(result) == f"{out}: the report could not be written: No space left on device"
    assert "Reward\trun" in result.stdout and "written" not in result.stdout
    assert files(out) == {"report.html": b"old"}


def test_a_folder_that_cannot_be_one_is_one_line(log, tmp_path):
    result = report(log, "-o", tmp_path / "run" / "metrics.jsonl")
    assert result.exit_code == 2
    file = tmp_path / "run" / "metrics.jsonl"
    assert told(result) == f"--output {file}: this is a file, and a folder is needed. Name another"


@pytest.mark.parametrize(("module", "function"), [(assemble, "read_log"), (writing, "as_png"), (writing, "put")])
def test_ctrl_c_is_one_line_and_leaves_the_old_report(log, out, monkeypatch, module, function):
    assert report(log, "-o", out).exit_code == 0
    before = files(out)

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupted)
    result = report(log, "-o", out, "--title", "new")
    assert result.exit_code == 130
    assert told(result) == "interrupted; an earlier report in the folder is as it was"
    assert files(out) == before


def test_a_full_disk_under_stdout_is_one_line_and_the_report_is_written(log, out):
    with open("/dev/full", "w") as full:
        done = in_a_process(log, "-o", out, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, told(done)) == (1, "the table could not be printed: No space left on device")
    assert set(files(out)) == FILES


def test_a_reader_that_goes_away_does_not_hinder_the_report(log, out):
    reader, writer = os.pipe()
    os.close(reader)
    done = in_a_process(log, "-o", out, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(files(out)) == FILES


@pytest.mark.parametrize("module", ["matplotlib", "numpy"])
def test_what_is_not_installed_is_named(log, out, module):
    done = in_a_process(log, "-o", out, before=f"sys.modules['{module}'] = None", capture_output=True)
    assert done.returncode == 2
    assert "pip install matplotlib" in told(done)
    assert ("Reward\trun" in done.stdout) == (module == "matplotlib")
    assert files(out) == {}


def test_a_stdout_that_has_no_greek_letters_gets_escapes(log, out):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = in_a_process(log, "-o", out, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Gap, mean |\\u0394 log p|\trun" in done.stdout


def test_reading_for_long_is_announced(log, out, monkeypatch):
    from verl_fp16.cli import report as command

    monkeypatch.setattr(command, "_LONG", 1)
    result = report(log, "-o", out)
    assert (result.exit_code, told(result)) == (0, "reading 0.0 MiB")


def test_the_help_needs_no_numpy_and_torch_is_never_imported(log, out):
    done = in_a_process(
        log,
        "-o",
        out,
        before="sys.modules['torch'] = sys.modules['verl'] = sys.modules['ray'] = None",
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_that_still_writes_is_reported_up_to_its_last_whole_line(tmp_path, out):
    log = write_log(tmp_path / "run" / "metrics.jsonl", range(1, 4))
    log.write_text(log.read_text() + entry(4, {"critic/score/mean": 9.0})[:20])
    result = report(log, "-o", out)
    assert result.exit_code == 0
    assert "run: note: the last line is half-written and was left out" in result.stdout.splitlines()
