"""A sweep with the launcher ``verl_fp16_processes``: a process for each run, of a small program and of verl's own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from verl_fp16 import process_sweep
from verl_fp16.refusal import Refused

ROOT = Path(__file__).parents[2]
LAUNCHER = "hydra/launcher=verl_fp16_processes"

APP = """
import json, os, pathlib, sys, time
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

@hydra.main(config_path="conf", config_name="base", version_base=None)
def main(config):
    hydra_config = HydraConfig.get()
    seen = {
        "pid": os.getpid(), "parent": os.getppid(), "values": OmegaConf.to_container(config, resolve=True),
        "number": hydra_config.job.num, "mode": hydra_config.mode.name, "overrides": list(hydra_config.overrides.task),
        "dont_write_bytecode": sys.flags.dont_write_bytecode, "module": __spec__ and __spec__.name,
    }
    pathlib.Path(hydra_config.runtime.output_dir, "seen.json").write_text(json.dumps(seen))
    print("from run", config.a, flush=True)
    if config.a == "fails":
        raise SystemExit(7)
    if config.a == "killed":
        os.kill(os.getpid(), 9)
    if config.a == "waits":
        file = pathlib.Path(hydra_config.runtime.output_dir, "interrupts")
        try:
            file.touch()
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(1)  # a clean-up, which a second one would cut short
            file.write_text("once")
            raise

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def program(tmp_path) -> Path:
    """A folder with app.py, the same as pkg/app.py, and their configurations."""
    for folder in (tmp_path, tmp_path / "pkg"):
        (folder / "conf").mkdir(parents=True)
        (folder / "app.py").write_text(APP)
        (folder / "conf" / "base.yaml").write_text("a: one\nb: two\n")
        (folder / "conf" / "sweep.yaml").write_text(
            "defaults: [base, override hydra/launcher: verl_fp16_processes, _self_]\n"
            "hydra: {mode: MULTIRUN, sweep: {dir: out}, sweeper: {params: {a: 'x,y'}}}\n"
        )
        (folder / "__init__.py").touch()
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def sweep(folder: Path, *arguments: str, limit_s: float = 120) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=limit_s
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def seen(folder: Path) -> list[dict]:
    """What the runs of a sweep's folder saw, in the order of their numbers."""
    return sorted((json.loads(file.read_text()) for file in folder.rglob("seen.json")), key=lambda run: run["number"])


def test_each_run_has_a_process_and_a_folder_of_its_own(program):
    done = sweep(program, "app.py", "--multirun", LAUNCHER, "hydra.sweep.dir=out", "a=x,y", "b=same")
    assert done.returncode == 0, done.stderr
    runs = seen(program / "out")
    assert len({run["pid"] for run in runs}) == 2 and len({run["parent"] for run in runs}) == 1
    assert [run["overrides"] for run in runs] == [["a=x", "b=same"], ["a=y", "b=same"]]
    assert [run["mode"] for run in runs] == ["RUN", "RUN"]
    lines = done.stderr.splitlines()
    assert lines[:2] == ["[1/2] a=x -> out/0", "[2/2] a=y -> out/1"], "the overrides in which they differ"
    assert re.fullmatch(r"a=x +out/0 +exit code 0 +\d+ s", lines[2]) and len(lines) == 4
    assert done.stdout.splitlines() == ["from run x", "from run y"]
    assert (program / "out" / "1" / ".hydra" / "overrides.yaml").read_text() == "- a=y\n- b=same\n"


def test_a_configuration_that_is_a_sweep_needs_no_option_and_a_module_is_started_as_one(program):
    done = sweep(program, "-B", "-m", "pkg.app", "--config-name", "sweep", "b=z")
    assert done.returncode == 0, done.stderr
    runs = seen(program / "out")
    assert [run["values"] for run in runs] == [{"a": "x", "b": "z"}, {"a": "y", "b": "z"}]
    assert [run["module"] for run in runs] == ["pkg.app", "pkg.app"]
    assert all(run["dont_write_bytecode"] for run in runs), "python's own options are kept"


def test_values_and_folders_come_through_as_they_are(program):
    values = ["it's", 'a "b"', "x, y", "k=v", "a  b", "back\\slash"]
    quoted = ",".join(json.dumps(value).replace("\\\\", "\\") for value in values)  # a lone backslash is itself
    odd = 'it\'s, "a=b" {c}'
    done = sweep(
        program,
        "app.py",
        "-m",
        LAUNCHER,
        f"a={quoted}",
        "b='fixed, of one'",
        "+c=[1,'p q']",
        "+d='${b}'",
        "hydra.sweep.dir=" + '"' + odd.replace('"', '\\"') + '"',
        "hydra.sweep.subdir='n=${hydra.job.num}, ${hydra:job.num}'",
    )
    assert done.returncode == 0, done.stderr
    runs = seen(program / odd)
    assert [run["values"]["a"] for run in runs] == values
    assert all(run["values"] == {**run["values"], "b": "fixed, of one", "c": [1, "p q"]} for run in runs)
    assert all(run["values"]["d"] == "fixed, of one" for run in runs)
    assert (program / odd / "n=5, 5" / "seen.json").exists()


@pytest.mark.parametrize("folder", ("plain", "it's", 'a "b"', "a,b=c", "x\\", "x\\'y", "${now:%Y}", " a ", "ü"))
def test_a_folder_is_quoted_so_that_hydra_reads_it_back(folder):
    (override,) = [
        part for part in process_sweep.command(["p"], [], [], folder, 3) if part.startswith("hydra.run.dir=")
    ]
    (parsed,) = OverridesParser.create().parse_overrides([override])
    assert OmegaConf.create({"dir": parsed.value()}).dir == folder


def test_a_run_that_fails_keeps_no_other_from_running_and_is_named(program):
    done = sweep(program, "app.py", "-m", LAUNCHER, "hydra.sweep.dir=out", "a=fails,killed,x")
    assert done.returncode == 1
    assert len(seen(program / "out")) == 3
    assert re.search(r"^a=fails +out/0 +exit code 7 +\d+ s$", done.stderr, re.M)
    last = "verl_fp16: 2 of 3 runs failed: a=fails (exit code 7); a=killed (exit code 137 (SIGKILL))"
    assert done.stderr.splitlines()[-1] == last


def test_a_run_that_cannot_be_started_has_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    missing = process_sweep.Job("a=x", "out/0", (str(tmp_path / "none"),))
    there = process_sweep.Job("a=y", "out/1", (sys.executable, "-c", "open('ran', 'w')"))
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed: a=x \(exit code 126\)$"):
        process_sweep.run_in_turn([missing, there])
    assert (tmp_path / "ran").exists()
    assert "verl_fp16: a=x cannot be started: No such file or directory\n" in capsys.readouterr().err


def test_hydras_options_are_kept(program):
    (program / "extra" / "team").mkdir(parents=True)
    (program / "extra" / "team" / "blue.yaml").write_text("colour: blue\n")
    (program / "elsewhere").mkdir()
    (program / "elsewhere" / "other.yaml").write_text("a: three\nb: four\n")
    options = ("-cp", "elsewhere", "--config-na", "other", "-cd", "extra")
    done = sweep(program, "app.py", *options, "-m", LAUNCHER, "hydra.sweep.dir=out", "a=x,y", "+team=blue")
    assert done.returncode == 0, done.stderr
    assert [run["values"] for run in seen(program / "out")] == [
        {"a": a, "b": "four", "team": {"colour": "blue"}} for a in "xy"
    ]


@pytest.mark.parametrize(("number", "code"), ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_a_signal_ends_the_running_one_and_starts_no_other(program, number, code):
    arguments = command("app.py", "-m", LAUNCHER, "hydra.sweep.dir=out", "a=waits,x")
    process = subprocess.Popen(
        arguments, cwd=program, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        interrupts = program / "out" / "0" / "interrupts"
        deadline = time.monotonic() + 60
        while not interrupts.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, told
    (run,) = seen(program / "out")
    with pytest.raises(ProcessLookupError):
        os.kill(run["pid"], 0)
    assert interrupts.read_text() == ("once" if number == signal.SIGINT else "")
    assert re.search(rf"^a=waits +out/0 +exit code {code} \({number.name}\)", told, re.M), told
    assert re.search(r"^a=x +out/1 +not started$", told, re.M)
    assert told.splitlines()[-1] == f"verl_fp16: {number.name}: the sweep was ended"


def test_batches_have_no_use_and_are_refused(program):
    done = sweep(program, "app.py", "-m", LAUNCHER, "hydra.sweep.dir=out", "a=x,y", "hydra.sweeper.max_batch_size=1")
    assert done.returncode == 1 and seen(program / "out") == []
    assert done.stderr.startswith("verl_fp16: hydra.sweeper.max_batch_size=1 has no use with ")


def test_runs_that_would_write_into_each_others_folders_are_refused(program):
    (program / "conf" / "base.yaml").write_text(
        "a: one\nname: same\ntrainer: {default_local_dir: 'checkpoints/${name}', save_freq: -1}\n"
    )
    arguments = ("app.py", "-m", LAUNCHER, "hydra.sweep.dir=out")
    for runs in (("a=x,y",), ("a=x,y", "hydra.sweep.subdir=one", "name='run-${a}'"), ("name=./same,same/",)):
        done = sweep(program, *arguments, *runs)
        assert done.returncode == 1 and seen(program / "out") == [], runs
        assert done.stderr.count("would share") == 1 and done.stderr.startswith("verl_fp16: the runs "), done.stderr
    for way_out in ("name='run-${a}'", "name='run-${hydra:job.num}'"):
        own = sweep(program, *arguments, "a=x,y", way_out, "hydra.sweep.subdir='${a}'")
        assert own.returncode == 0, own.stderr


def test_a_program_that_changed_its_arguments_is_not_started_with_them():
    started = ["python", "-m", "pkg.app", "mine", "a=1,2", "-m"]
    program = process_sweep.this_program("/bin/python", started, ["/pkg/app.py", "mine", "a=1,2", "-m"])
    assert program == ("/bin/python", "-m", "pkg.app")
    with pytest.raises(Refused, match="has changed its arguments"):
        process_sweep.this_program("/bin/python", started, ["/pkg/app.py", "a=1,2", "-m", "--run"])


def test_verls_own_launcher_starts_the_precision_ablation(tmp_path):
    """Each run is a whole start, which is refused here, by its own guard and for its own precision."""
    done = sweep(
        tmp_path,
        "-m",
        "verl.trainer.main_ppo",
        "--config-name",
        "precision_ablation",
        "precision=fp16,fp32",
        "actor_rollout_ref.rollout.dtype=bfloat16",
        "hydra.sweep.dir=out",
        limit_s=500,
    )
    assert done.returncode == 1, done.stderr
    assert "[1/2] precision=fp16 -> out/0" in done.stderr and "[2/2] precision=fp32 -> out/1" in done.stderr
    assert "ray init kwargs" not in done.stdout
    first, second = done.stderr.split("[2/2]")
    assert "training float16, rollout float16" in first and "training float32, rollout float32" in second
    assert "verl_fp16: 2 of 2 runs failed: precision=fp16 (exit code 1); precision=fp32 (exit code 1)" in done.stderr


def test_a_sweep_of_the_flag_with_hydras_basic_launcher_is_refused_before_ray(tmp_path):
    """The flag brings the launcher along, but not where the flag itself is swept."""
    arguments = ("-m", "verl.trainer.main_ppo", "-m", "+precision=fp16,bf16", "hydra.sweep.dir=out")
    done = sweep(tmp_path, *arguments, limit_s=300)
    assert done.returncode == 1 and "ray init kwargs" not in done.stdout
    assert done.stderr.count("add hydra/launcher=verl_fp16_processes") == 1, done.stderr
