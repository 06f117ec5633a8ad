"""verl's own tests, out of its wheel, have the same outcome with this package installed as without it.

The wheel's ``tests`` folder is copied to a temporary folder and run there against the installed verl, by two pytest
processes. Compared is the outcome of every test. Files whose every test needs a GPU or a download are not run.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import pytest
from releases import release_folder

QUICK = (
    "checkpoint_engine/test_block_placement.py",
    "checkpoint_engine/test_fsdp_lora_only_checkpoint_on_cpu.py",
    "checkpoint_engine/test_global_steps_on_cpu.py",
    "checkpoint_engine/test_sglang_fusion_bucketing_on_cpu.py",
    "checkpoint_engine/test_sglang_loader.py",
    "checkpoint_engine/test_sharded_delta.py",
    "experimental/agent_loop/test_agent_loop_extra_fields_schema_on_cpu.py",
    "experimental/agent_loop/test_audio_server_contract_on_cpu.py",
    "experimental/agent_loop/test_call_tool_on_cpu.py",
    "experimental/agent_loop/test_gpt_oss_tool_parser.py",
    "experimental/agent_loop/test_multimodal_position_ids_on_cpu.py",
    "experimental/agent_loop/test_qwen3_tool_parser_on_cpu.py",
    "experimental/agent_loop/test_tool_call_id_on_cpu.py",
    "experimental/fully_async_policy/test_async_genrm_config_on_cpu.py",
    "plugin/test_platform_abstraction.py",
    "single_controller/test_get_set_dispatch_collect_cpu.py",
    "test_base_config_on_cpu.py",
    "test_protocol_on_cpu.py",
    "test_protocol_v2_on_cpu.py",
    "tools",
    "trainer",
)
# They start Ray: half a minute to two minutes each.
WITH_RAY = (
    "single_controller/test_auto_padding_on_cpu.py",
    "single_controller/test_decorator_on_cpu.py",
    "single_controller/test_fused_workers_on_cpu.py",
    "single_controller/test_ray_utils_on_cpu.py",
)

# What the run itself saw: a pytest plugin, written beside the copied tests.
PROBE = """
import json, os, sys

def pytest_sessionfinish(session):
    import verl
    hooks = sys.modules.get("verl_fp16.hooks")
    seen = {"verl": verl.__file__, "hooks": hooks and hooks.patcher.status()}
    with open(os.environ["PROBE_OUT"], "w") as file:
        json.dump(seen, file)
"""


class Run(NamedTuple):
    """One pytest process: test id -> outcome, where verl came from, and the hooks in place at the end."""

    outcomes: dict[str, str]
    verl: Path
    hooks: dict[str, str] | None


def run_both(files: tuple[str, ...], folder: Path, timeout: float) -> tuple[Run, Run]:
    """Run ``files`` of the installed verl's tests without and with this package, at the same time."""
    children = {}
    for what in ("plain", "installed"):
        rootdir = folder / what
        shutil.copytree(release_folder(importlib.metadata.version("verl")) / "tests", rootdir / "tests")
        (rootdir / "probe.py").write_text(PROBE)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "PYTEST_"))}
        environment |= {
            "PROBE_OUT": str(rootdir / "probe.json"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # Some take a fixed port, which the other run's may be listening on.
        environment["MASTER_PORT"] = str(_free_port())
        if what == "plain":
            environment["VERL_USE_EXTERNAL_PLUGINS"] = "none"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "probe"]
        command += ["--rootdir", str(rootdir), "-c", os.devnull, "--junitxml", str(rootdir / "outcomes.xml")]
        command += [f"tests/{name}" for name in files]
        log = open(rootdir / "log.txt", "w")
        # A session of its own, so that what Ray starts can be ended with it.
        child = subprocess.Popen(
            command, cwd=rootdir, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        children[what] = child, log
    try:
        for child, _ in children.values():
            child.wait(timeout=timeout)
    finally:
        for child, log in children.values():
            _end_session(child)
            log.close()
    return read(folder / "plain"), read(folder / "installed")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_session(child: subprocess.Popen) -> None:
    import psutil

    left = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
    for process in left:
        process.kill()
    child.kill()
    child.wait()


def read(rootdir: Path) -> Run:
    log = (rootdir / "log.txt").read_text()[-3000:]
    assert (rootdir / "outcomes.xml").exists(), log
    outcomes = {}
    for case in ElementTree.parse(rootdir / "outcomes.xml").iter("testcase"):
        found = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = ", ".join(found) or "passed"
    probe = json.loads((rootdir / "probe.json").read_text())
    return Run(outcomes, Path(probe["verl"]), probe["hooks"])


def hold_equal(plain: Run, installed: Run, at_least: int) -> None:
    """The comparison, and what makes it worth something: the installed verl, hooks in place, tests that passed."""
    assert plain.hooks is None
    statuses = {status.partition(":")[0] for status in (installed.hooks or {}).values()}
    assert statuses and statuses <= {"applied", "pending", "not needed"}, installed.hooks
    home = Path(sys.prefix).resolve()
    assert plain.verl == installed.verl and plain.verl.resolve().is_relative_to(home)
    differ = {
        test: (plain.outcomes.get(test, "absent"), installed.outcomes.get(test, "absent"))
        for test in plain.outcomes.keys() | installed.outcomes.keys()
        if plain.outcomes.get(test) != installed.outcomes.get(test)
    }
    assert differ == {}
    count = collections.Counter(plain.outcomes.values())
    print(f"verl's own tests: {dict(count)}")
    assert count["passed"] >= at_least, count


def test_quick_ones(tmp_path):
    plain, installed = run_both(QUICK, tmp_path, timeout=170)
    hold_equal(plain, installed, at_least=350)
    assert installed.hooks["driver.check"] == "applied"
    assert installed.hooks["engine.loss_scaler"] == "applied", "some of the tests import the FSDP engine"


@pytest.mark.slow
@pytest.mark.parametrize("file", WITH_RAY)
def test_ones_that_start_ray(tmp_path, file):
    hold_equal(*run_both((file,), tmp_path, timeout=400), at_least=1)
