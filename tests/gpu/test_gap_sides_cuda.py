"""Both sides of ``verl-fp16 mismatch`` on a GPU: the command itself, with vLLM's CUDA build and FSDP over NCCL."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("verl", reason="verl is not installed here")
pytest.importorskip("vllm", reason="vLLM is not installed here")


@pytest.mark.parametrize("attention", ("sdpa", "flash_attention_2"))
def test_fp16_is_closer_than_bf16_on_the_same_tokens(sharp_model, tmp_path, attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed here")
    (tmp_path / "prompts.txt").write_text("".join(f"{number}+{number}=\n" for number in range(8)))
    command = [sys.executable, "-m", "verl_fp16.cli", "mismatch", str(sharp_model), "--same-tokens"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--samples", "16", "--lengths", "20:100"]
    command += ["--attention", attention, "--gpu-memory-utilization", "0.3", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr + (tmp_path / "out" / "stages.log").read_text()[-3000:]
    found = json.loads((tmp_path / "out" / "mismatch.json").read_text())["measurements"]
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        assert found[name]["found"] == {"training": {"autocast": dtype, "weights": [dtype]}, "rollout": [dtype]}
    factors = found["fp16"]["factors of bf16 over it"]
    assert factors["log_prob_abs_diff_mean"]["low"] > 3 and factors["k3"]["low"] > 10
