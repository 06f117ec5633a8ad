"""The command selftest: what it prints, what it keeps to itself, its exit codes and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
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
    assert all(len(row) == 4 and row[1] == "PASS" and row[2] for row in cells)
    assert all(row[3].isdecimal() for row in cells[1:])
    names = [row[0] for row in cells]
    assert (
        names[:2] == ["device", "doctor"]
        and "engine fsdp2: skipped update" in names
        and names[-1] == "throughput: log-prob pass"
    )
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
    assert {line.split("\t")[0].split()[0] for line in result.stdout.splitlines()[:-1]} == {
        "device",
        "doctor",
        "engine",
    }
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
    model = a_model(tmp_path / "shared" / "secret-project")
    (tmp_path / "shared" / "our-prompts.txt").write_text("1+1=\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MY_SETTING", "a-value-of-mine")
    monkeypatch.setattr(socket, "gethostname", lambda: "node17-example")
    monkeypatch.setattr(socket, "getfqdn", lambda: "node17-example.cluster.corp.org")
    monkeypatch.setattr(machine, "_user", lambda: "alice")
    line = f"{home}/x failed on node17-example (10.1.2.3, fe80::1ff:fe23:90a at 12:34:56) for alice with {TOKEN} and "
    line += "a-value-of-mine"
    doctor = samples.doctor()
    doctor["checks"][1]["found"] = f"applied by {TOKEN} to {model}/config.json on db.cluster.corp.org"
    prompts, host = tmp_path / "shared" / "our-prompts.txt", "node17-example.cluster.corp.org"
    given = ("--model", str(model), "--prompts", "shared/our-prompts.txt")
    result = command(
        "--json",
        "--record",
        "record.json",
        *given,
        run=f"crash: {line}",
        doctor=doctor,
        gap=f"crash: {prompts} of {host}",
    )
    assert result.exit_code == 1, result.output
    assert line in Path("outputs/selftest/run.log").read_text(), "the log is the user's own"
    for text in (result.stdout, Path("record.json").read_text()):
        assert "~/x failed on <host> (<address>, <address> at 12:34:56) for <user> with <HF_TOKEN> and <MY_SET" in text
        assert "ValueError: <prompts> of <host>" in text
        hidden = (str(home), "alice", TOKEN, "node17", "10.1.2.3", "fe80", "a-value-of-mine", str(tmp_path), "corp")
        for secret in hidden:
            assert secret not in text, secret
    told = "ok: applied by <HF_TOKEN> to <model>/config.json on db.<domain>"
    assert json.loads(result.stdout)["hooks"] == {"engine.loss_scaler": told}
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
        (("--model", "nothing"), "--model nothing: there is no such folder. Name a Hugging Face model"),
        (("--model", "empty"), "--model empty: there is no config.json in it. Name a Hugging Face model folder"),
        (("--prompts", "nothing.txt"), "--prompts nothing.txt: there is no such file. Give"),
        (("--prompts", "empty"), "--prompts empty: this is a folder"),
        (("--gpus", "3"), "--gpus 3: torch sees no GPU, and there are 2 cores for processes"),
        (("--only", "engine,motor"), "--only motor: there is no such stage. Name some of doctor, engine, run, gap"),
        (("--only", ""), "--only '': there is no such stage"),
        (("--output", "file"), "--output file: this is a file"),
        (("--output", "a${b"), "--output 'a${b': it has a character that Hydra cannot take"),
        (("--record", "no/such.json"), "--record no/such.json: there is no folder"),
        (("--record", "empty"), "--record empty: this is no file that can be replaced. Name another"),
        (("--record", "pipe"), "--record pipe: this is no file that can be replaced. Name another"),
    ),
)
def test_wrong_inputs_are_refused_before_anything_runs(command, options, message):
    Path("empty").mkdir()
    Path("file").touch()
    os.mkfifo("pipe")
    assert message in refused(command(*options))


def test_a_record_in_a_folder_that_cannot_be_written_is_refused_before_anything_runs(command, monkeypatch):
    def full(*, dir: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    said = refused(command("--record", "here.json"))
    assert f"--record here.json: nothing can be written to {Path.cwd()}: No space left on device" in said


@pytest.mark.parametrize("how", ("--json", "--only=doctor,engine,run,gap,throughput"))
def test_a_record_that_fails_in_the_end_loses_nothing_of_the_result(command, monkeypatch, how):
    def full(*_):
        raise OSError(28, "No space left on device", "record.json")

    monkeypatch.setattr("verl_fp16.cli.selftest.write_whole", full)
    result = command("--record", "record.json", how)
    assert result.exit_code == 2 and "throughput: rollout" in result.stdout
    told = "--record record.json: No space left on device. The result is what was printed; name another"
    assert told in result.stderr.splitlines()[-1]


def test_devices_that_could_not_be_looked_at_are_not_no_devices(command, monkeypatch):
    found = {"failed": "the run took longer than 120 s and was ended"}
    monkeypatch.setattr("verl_fp16.doctor.examination.look", lambda *_: found)
    told = refused(command())
    assert "torch's look at the GPUs failed: the run took longer than 120 s" in told and "verl-fp16 doctor" in told


def test_a_shell_that_chose_the_cpu_is_refused_where_there_are_gpus(command, monkeypatch):
    monkeypatch.setattr("verl_fp16.doctor.examination.look", lambda *_: {"gpus": [{"name": "H200", "memory": 1}]})
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert "VERL_PLATFORM=cpu, and torch sees a GPU: unset it, or set CUDA_VISIBLE_DEVICES=" in refused(command())


def test_a_gpu_that_torch_does_not_see_is_a_failure(command, monkeypatch):
    host = dataclasses.replace(machine.read_host(), gpu_device=True)
    monkeypatch.setattr(machine, "read_host", lambda: host)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    result = command("--only", "engine")
    assert result.exit_code == 1
    device, engine = (line.split("\t") for line in result.stdout.splitlines()[:-1])
    assert device[:2] == ["device", "FAIL"] and "torch 2 does not see (it is a build without CUDA)" in device[2]
    assert engine[:2] == ["engine", "SKIP"] and "device failed" in engine[2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = command("--only", "doctor")
    assert result.exit_code == 0 and "hidden by CUDA_VISIBLE_DEVICES" in result.stdout.splitlines()[0]


def test_two_in_one_folder_are_refused(command):
    from verl_fp16.selftest.alone import alone_in

    with alone_in(Path("there")):
        told = refused(command("-o", "there"))
    assert f"--output there: another selftest is at work there (process {os.getpid()}). Wait for it, or name" in told
    assert [path.name for path in Path("there").iterdir()] == [".selftest.lock"]
    assert command("-o", "there", "--only", "doctor").exit_code == 0, "what ended holds nothing"


def test_no_gpu_at_all_is_refused(command):
    result = command("--gpus", "0")
    assert result.exit_code == 2 and "--gpus" in result.stderr and not Path("outputs").exists()


def test_more_gpus_than_there_are(command, monkeypatch):
    devices = {"gpus": [{"name": "H200", "memory": 141 * 2**30}]}
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


def test_what_is_hidden_is_no_word_of_the_report(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr(socket, "getfqdn", lambda: "localhost.localdomain")
    environment = {"TERM": "xterm", "DTYPE": "bfloat16", "HOME": "/", "API_KEY": "abc1"}
    environment |= {"TORCH_VERSION": "2.13.0+cu130.1", "CUDA_VERSION": "13.0.1-012.post1"}
    hidden = machine.private(environment, {"<output>": Path("/o")})
    assert machine.scrubbed("xterm bfloat16 / abc1 /o/run.log 2.13.0 on localhost", hidden) == (
        "xterm bfloat16 / <API_KEY> <output>/run.log 2.13.0 on localhost"
    )
    assert (
        machine.scrubbed("torch 2.13.0+cu130.1, 13.0.1-012.post1", hidden) == "torch 2.13.0+cu130.1, 13.0.1-012.post1"
    )
    assert machine.scrubbed({"a": ["abc1", 3, None]}, hidden) == {"a": ["<API_KEY>", 3, None]}


@pytest.mark.parametrize(
    ("text", "shown"),
    (
        ("::1 and [2001:db8::1]:80", "<address> and [<address>]:80"),
        ("fe80::1%eth0", "<address>%eth0"),
        ("1:2:3:4:5:6:7:8", "<address>"),
        ("at 20:09:58, vLLM::EngineCore, ray::IDLE, std::a, a ratio of 1:2", None),
        ("torch 2.13.0, driver 570.86.15", None),
    ),
)
def test_addresses_of_networks_are_told_from_times_and_names(text, shown):
    assert machine.scrubbed(text, []) == (shown or text)


def test_hooks_are_those_of_the_doctor():
    assert machine.hooks(samples.doctor()) == {"engine.loss_scaler": "ok: applied"}
    assert machine.hooks(None) == {}
