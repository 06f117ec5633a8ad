"""The commands as a user starts them, in processes of their own, against the installed verl."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from verl_fp16.doctor import checks
from verl_fp16.doctor.examination import look
from verl_fp16.hooks import HOOKS
from verl_fp16.installed import InstalledVerl, find_verl

COMMAND = (sys.executable, "-m", "verl_fp16.cli")
TIMEOUT_S = 300


def start(*arguments: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )


def with_site(folder: Path, code: str) -> dict[str, str]:
    """An environment in which every Python process runs ``code`` first."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def verl_of_another_version(folder: Path, version: str) -> Path:
    """A folder from which the installed verl is imported under another version."""
    package = folder / "verl"
    package.mkdir()
    for entry in find_verl().folder.iterdir():
        if entry.name not in ("version", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    (package / "version").mkdir()
    (package / "version" / "version").write_text(version)
    return folder


def of_a_run(environ: dict[str, str]) -> dict[str, str]:
    """The environment in which the doctor looks inside, with something planted."""
    return {**os.environ, "VERL_PLATFORM": "cpu", **environ}


def test_the_entry_point_is_installed():
    script = Path(sys.executable).with_name("verl-fp16")
    process = subprocess.run([script, "recipes", "list"], capture_output=True, text=True)
    assert "\nquickstart\t" in process.stdout, process.stderr


def test_doctor_finds_the_test_environment_fit_and_leaves_nothing_behind():
    mine = psutil.Process()
    shared, children = set(os.listdir("/dev/shm")), set(mine.children(recursive=True))
    process = start("doctor", "--json")
    found = json.loads(process.stdout)
    assert [row for row in found["checks"] if row["status"] == "error"] == []
    assert (process.returncode, found["would_start"]) == (0, True)
    names = {row["name"] for row in found["checks"]}
    assert {"verl", "torch", "ray", "plugin in a child process", "plugin in a Ray worker"} <= names
    assert "hook engine.loss_scaler" in names
    assert "a worker of a local Ray" in process.stderr, "what takes long is announced"
    assert set(mine.children(recursive=True)) <= children
    marks = [p for p in psutil.process_iter() if p.ppid() == 1 and "verl_fp16.doctor" in " ".join(_cmdline(p))]
    assert marks == []
    fresh = set(os.listdir("/dev/shm")) - shared
    assert {name for name in fresh if name.startswith(("plasma", "psm_", "sem.mp-"))} == set()


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_doctor_refuses_an_unknown_verl_with_its_version_and_what_to_do(tmp_path):
    process = start("doctor", "--no-ray", cwd=verl_of_another_version(tmp_path, "0.10.0"))
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in process.stdout.splitlines() if "\t" in line}
    assert process.returncode == 1
    assert rows["verl"][0] == "error"
    assert rows["verl"][1].startswith("0.10.0 ")
    assert "pip install verl==" in rows["verl"][3]
    assert "would not start: verl" in process.stdout
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("environ", "fix"),
    (
        ({"VERL_FP16_DISABLE": "1"}, "unset VERL_FP16_DISABLE"),
        ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, "VERL_USE_EXTERNAL_PLUGINS=none leaves it out"),
        ({"VERL_USE_EXTERNAL_PLUGINS": "verl_fp16"}, "add verl_fp16_cpu"),
    ),
)
def test_a_fresh_process_that_lacks_the_plugin_is_found(environ, fix):
    environ = of_a_run(environ)
    check = checks.check_plugin(look("plugin", environ, TIMEOUT_S), environ, find_verl())
    assert check.status == "error"
    assert fix in check.fix


def test_a_broken_hook_is_a_row_of_its_own(tmp_path):
    """What verl would keep to itself: the function that a hook wraps is not there."""
    plant = (
        "import importlib.abc, sys\n"
        "class Plant(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'verl.utils.debug.metrics':\n"
        "            from importlib.machinery import PathFinder\n"
        "            spec = PathFinder.find_spec(name, path)\n"
        "            run = spec.loader.exec_module\n"
        "            def exec_module(module):\n"
        "                run(module)\n"
        "                del module.calculate_debug_metrics\n"
        "            spec.loader.exec_module = exec_module\n"
        "            return spec\n"
        "sys.meta_path.insert(0, Plant())\n"
    )
    environ = of_a_run(with_site(tmp_path, plant))
    facts = look("plugin", environ, TIMEOUT_S)
    rows = {check.name: check for check in checks.check_hooks(facts)}
    broken = rows.pop("hook mismatch.measure")
    assert broken.status == "error"
    assert "calculate_debug_metrics" in broken.found
    others = [rows[f"hook {hook.name}"].found for hook in HOOKS if hook.name != "mismatch.measure"]
    assert all(found.startswith("withdrawn: ") for found in others), "all or nothing"
    assert checks.check_plugin(facts, environ, find_verl()).status == "error"


def test_a_ray_worker_without_the_package_is_found(tmp_path):
    plant = (
        "import os, sys\n"
        "if any('default_worker.py' in argument for argument in getattr(sys, 'orig_argv', sys.argv)):\n"
        "    sys.modules['verl_fp16'] = None\n"
    )
    environ = of_a_run(with_site(tmp_path, plant))
    check = checks.check_ray_worker(look("ray", environ, TIMEOUT_S), environ, find_verl(), "0.1.0")
    assert check.status == "error"
    assert check.fix == "install verl-fp16 on every node of the cluster"


def test_config_composes_with_the_installed_verl_and_does_not_import_it(tmp_path):
    plant = with_site(tmp_path, "import sys\nfor name in ('torch', 'ray'):\n    sys.modules[name] = None\n")
    process = start("config", "+precision=fp16", **plant)
    assert process.returncode == 0, process.stderr
    rows = dict(line.split("\t", 1) for line in process.stdout.splitlines())
    assert rows["actor_rollout_ref.rollout.dtype"] == "bfloat16\tfloat16"
    assert rows["verl_fp16.train_dtype"] == "(absent)\tfloat16"


def test_config_shows_what_verls_launcher_composes(tmp_path):
    """The same recipe and overrides through ``config --all`` and through verl itself."""
    assert start("recipes", "copy", "quickstart", str(tmp_path)).returncode == 0
    path = tmp_path / "quickstart.yaml"
    path.write_text(path.read_text().replace("experiment_name: quickstart", "experiment_name: my-own"))
    arguments = (str(path), "precision=bf16", "+my.key=[1, 2]", "~data.seed")
    ours = start("config", "--all", *arguments)
    run = (*arguments, "--cfg", "job", "--resolve")
    theirs = start("run", *run, cwd=tmp_path)
    assert (ours.returncode, theirs.returncode) == (0, 0), theirs.stderr
    import yaml

    expected = yaml.safe_load(theirs.stdout[theirs.stdout.index("actor_rollout_ref:") :])
    found = yaml.safe_load(ours.stdout)
    assert expected["trainer"]["experiment_name"] == "my-own", "a copy that kept its name is not the shipped recipe"
    assert {key: found[key] for key in expected} == expected


def test_run_returns_the_childs_exit_code_and_dry_run_starts_nothing(tmp_path):
    dry = start("run", "quickstart", "--dry-run", "data.seed=1")
    command = shlex.split(dry.stdout)
    assert command[1:] == ["-m", "verl.trainer.main_ppo", "--config-name", "quickstart", "data.seed=1"]
    wrong = start("run", "quickstart", "no_such_key=1", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "no_such_key" in wrong.stderr


def test_below_0_9_run_names_the_plugins_in_the_environment(tmp_path):
    folder = verl_of_another_version(tmp_path, "0.8.0")
    dry = start("run", "quickstart", "--dry-run", cwd=folder, VERL_USE_EXTERNAL_MODULES="mine")
    assert dry.stdout.startswith("VERL_USE_EXTERNAL_MODULES=mine,verl_fp16.plugin,verl_fp16.cpu.plugin ")
    assert "runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES" in dry.stdout


def test_the_installed_verl_is_told_as_it_tells_itself():
    import verl

    assert find_verl() == InstalledVerl(verl.__version__, Path(verl.__file__).parent)
