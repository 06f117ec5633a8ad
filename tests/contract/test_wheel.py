"""The wheel, built through a source archive as pip and build do it, has everything that the checkout has."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_COMPOSE = """
import verl, verl_fp16
from hydra import compose, initialize_config_module
with initialize_config_module("verl.trainer.config", version_base=None):
    config = compose("quickstart", overrides=["precision=bf16"])
    # Its groups are made of further groups.
    large = compose("moe_pg_seq_tis", overrides=["scale=gpus_8_large"])
print(verl_fp16.__file__)
print(config.trainer.device, config.actor_rollout_ref.rollout.dtype)
print(large.trainer.experiment_name, large.actor_rollout_ref.rollout.tensor_model_parallel_size)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    build = [sys.executable, "-m", "uv", "build", "--no-build-isolation", "--out-dir", str(folder), str(ROOT)]
    process = subprocess.run(build, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_flag_and_the_recipes_work_from_the_wheel(installed):
    env = {**os.environ, "PYTHONPATH": str(installed)}
    process = subprocess.run([sys.executable, "-c", _COMPOSE], capture_output=True, text=True, env=env, cwd=installed)
    assert process.returncode == 0, process.stderr
    where, what, of_groups = process.stdout.splitlines()[-3:]
    assert Path(where).is_relative_to(installed), "the wheel, not the checkout"
    assert what == "cpu bfloat16"
    assert of_groups == "math_long-qwen3_30b_a3b-pg_seq_tis-float16-float16 4"


def test_no_python_or_yaml_file_is_missing(installed):
    def files(folder: Path) -> set[Path]:
        found = {*folder.rglob("*.py"), *folder.rglob("*.yaml")}
        return {path.relative_to(folder) for path in found}

    for package in ("verl_fp16", "hydra_plugins"):
        assert files(installed / package) >= files(ROOT / package)
    assert files(installed / "verl_fp16" / "recipes") == files(ROOT / "recipes")


def test_entry_points(installed):
    (text,) = (path.read_text() for path in installed.glob("*.dist-info/entry_points.txt"))
    assert "verl_fp16 = verl_fp16.plugin" in text
    assert "verl_fp16_cpu = verl_fp16.cpu.plugin" in text
    assert "verl_fp16_cpu = verl_fp16.cpu.vllm_plugin:load" in text
