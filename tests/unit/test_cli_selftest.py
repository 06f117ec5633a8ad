"""The command selftest: what it prints, what it keeps to itself, its exit codes and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import selftest_samples as samples
from typer.testing import CliRunner

from verl_fp16.cli.app import app
from verl_fp16.selftest import driver, machine

HERE = Path(__file__).parent
TOKEN = "hf_abcdefghij"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Calls it in a folder of its own, with stages that do what they are told, without a GPU."""
    monkeypatch.setattr(driver, "STAGE", "selftest_stages")
    monkeypatch.setattr("verl_fp16.doctor.examination.look", lambda *_: {"torch": "2", "cuda": None, "gpus": []})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.chdir(tmp_path)

    def call(*options: str, **stages):
        monkeypatch.setenv("SELFTEST_FAKE", json.dumps(stages))
        return CliRunner().invoke(app, ["selftest", *options])

    return call


def refused(result) -> str:
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert "Traceback" not in result.stderr and not Path("outputs").exists()
    return result.stderr.splitlines()[-1]


def test_one_table_with_every_row_and_its_seconds(command):
    result = command("--gpus", "2")
    assert result.exit_code == 0, result.output
    *rows, verdict = result.stdout.splitlines()
    cells = [row.split("\t") for row in rows]
    assert all(len(row) == 4 and row[1] == "PASS" and row[2] and row[3].isdecimal() for row in cells)
    names = [row[0] for row in cells]
    assert names[0] == "doctor" and "engine fsdp2: skipped update" in names and names[-1] == "throughput: log-prob pass"
    assert verdict == "Nothing failed."
    assert "stage 1 of 5, doctor" in result.stderr and "left" in result.stderr
    assert Path("outputs/selftest/engine.log").exists()


def test_a_failure_is_named_with_its_log_and_is_the_exit_code(command):
    result = command(run="crash: verl went away")
    assert result.exit_code == 1
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("run\t")]
    assert row.split("\t")[1] == "FAIL" and "ValueError: verl went away" in row
    assert f"(log: {Path('outputs/selftest/run.log')})" in row
    assert Path("outputs/selftest/run.log").read_text() == "ValueError: verl went away\n"
    assert result.stdout.splitlines()[-1] == "FP16 is not fit here: run"
    result = command(gap="crash: x")
    assert result.stdout.splitlines()[-1] == "FP16 is not fit here: gap, 1 not tested"


def test_only_and_output(command):
    result = command("--only", "engine, doctor", "-o", "here")
    assert result.exit_code == 0
    assert {line.split("\t")[0].split()[0] for line in result.stdout.splitlines()[:-1]} == {"doctor", "engine"}
    assert Path("here/engine.json").exists() and not Path("here/gap.json").exists()


def test_json_says_what_a_report_of_a_bug_needs(command):
    result = command("--json")
    found = json.loads(result.stdout)
    assert {"date", "device", "gpus", "versions", "hooks", "rows", "asked"} <= set(found)
    assert {"verl_fp16", "verl", "torch", "vllm", "ray", "transformers", "cuda", "driver"} <= set(found["versions"])
    assert found["hooks"] == {"engine.loss_scaler": "ok: applied"}
    assert all({"name", "status", "reason", "seconds", "log"} == set(row) for row in found["rows"])


def test_json_and_record_keep_secrets(command, monkeypatch, tmp_path):
    home = tmp_path / "home" / "alice-of-example"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MY_SETTING", "a-value-of-mine")
    monkeypatch.setattr(socket, "gethostname", lambda: "node17-example")
    monkeypatch.setattr(machine, "_user", lambda: "alice")
    line = f"{home}/x failed on node17-example (10.1.2.3) for alice with {TOKEN} and a-value-of-mine"
    result = command("--json", "--record", "record.json", "--model", str(a_model(home / "m")), run=f"crash: {line}")
    assert result.exit_code == 1, result.output
    assert line in Path("outputs/selftest/run.log").read_text(), "the log is the user's own"
    for text in (result.stdout, Path("record.json").read_text()):
        assert "ValueError: ~/x failed on <host> (<address>) for <user> with <HF_TOKEN> and <MY_SETTING>" in text
        for secret in (str(home), "alice", TOKEN, "node17", "10.1.2.3", "a-value-of-mine", str(tmp_path)):
            assert secret not in text, secret
    assert "verl_fp16" in json.loads(Path("record.json").read_text())["versions"]


def test_record_has_the_shape_of_the_results(command):
    assert command("--record", "record.json").exit_code == 0
    found = json.loads(Path("record.json").read_text())
    assert set(found) == {"date", "gpu", "driver", "versions", "rows"}
    assert all(set(row) == {"name", "status", "reason", "seconds"} for row in found["rows"])


def a_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_the_users_model_and_prompts_reach_the_stages(command, tmp_path):
    (tmp_path / "p.txt").write_text("1+1=\n")
    assert command("--model", str(a_model(tmp_path / "m")), "--prompts", "p.txt").exit_code == 0
    seen = json.loads(Path("outputs/selftest/gap.spec-seen").read_text())
    assert (seen["model"], seen["prompts"]) == (str(tmp_path / "m"), str(tmp_path / "p.txt"))
    assert json.loads(Path("outputs/selftest/engine.spec-seen").read_text())["model"].endswith("selftest/model")


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--model", "nothing"), "--model nothing: there is no such file or folder"),
        (("--model", "empty"), "--model empty: there is no config.json in it. Name a Hugging Face model folder"),
        (("--prompts", "nothing.txt"), "--prompts nothing.txt: there is no such file. Give"),
        (("--prompts", "empty"), "--prompts empty: this is a folder"),
        (("--gpus", "3"), "--gpus 3: torch sees no GPU, and there are 2 cores for processes"),
        (("--only", "engine,motor"), "--only motor: there is no such stage. Name some of doctor, engine, run, gap"),
        (("--only", ""), "--only '': there is no such stage"),
        (("--output", "file"), "--output file: this is a file"),
        (("--output", "a${b"), "--output 'a${b': it has a character that Hydra cannot take"),
        (("--record", "no/such.json"), "--record no/such.json: there is no folder"),
    ),
)
def test_wrong_inputs_are_refused_before_anything_runs(command, options, message):
    Path("empty").mkdir()
    Path("file").touch()
    assert message in refused(command(*options))


def test_no_gpu_at_all_is_refused(command):
    result = command("--gpus", "0")
    assert result.exit_code == 2 and "--gpus" in result.stderr and not Path("outputs").exists()


def test_more_gpus_than_there_are(command, monkeypatch):
    devices = {"gpus": [{"name": "H200"}]}
    monkeypatch.setattr("verl_fp16.doctor.examination.look", lambda *_: devices)
    assert "--gpus 2: torch sees 1. Give at most so many" in refused(command("--gpus", "2"))


def test_ctrl_c_ends_what_was_started(tmp_path):
    script = (
        "from verl_fp16.selftest import driver\n"
        "from verl_fp16.doctor import examination\n"
        "driver.STAGE = 'selftest_stages'\n"
        "examination.look = lambda *_: {'gpus': []}\n"
        "from verl_fp16.cli.app import app\n"
        "app(['selftest', '-o', 'out'])\n"
    )
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "SELFTEST_FAKE": '{"engine": "hang"}'}
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(1200):
            if (tmp_path / "out" / "hanging").exists() and (tmp_path / "out" / "hanging").read_text():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "verl-fp16: interrupted; everything that was started has been ended"
    assert not psutil.pid_exists(int((tmp_path / "out" / "hanging").read_text()))


def test_what_is_hidden_is_no_word_of_the_report():
    hidden = machine.private({"TERM": "xterm", "DTYPE": "bfloat16", "HOME": "/", "API_KEY": "abc1"}, Path("/o"))
    assert machine.scrubbed("xterm bfloat16 / abc1 /o/run.log 2.13.0", hidden) == (
        "xterm bfloat16 / <API_KEY> <output>/run.log 2.13.0"
    )
    assert machine.scrubbed({"a": ["abc1", 3, None]}, hidden) == {"a": ["<API_KEY>", 3, None]}


def test_hooks_are_those_of_the_doctor():
    assert machine.hooks(samples.doctor()) == {"engine.loss_scaler": "ok: applied"}
    assert machine.hooks(None) == {}
