"""The self-test's short run on every supported verl: Hydra composes it and the guard passes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from releases import RELEASES, release_folder

from verl_fp16.config_difference import compose, flatten
from verl_fp16.selftest import run_stage


@pytest.mark.parametrize("flash", (True, False))
@pytest.mark.parametrize("model", (None, "/models/my 'model'"))
@pytest.mark.parametrize("device", ("cpu", "gpu"))
@pytest.mark.parametrize("release", RELEASES)
def test_it_composes_and_declares_float16(release, device, model, flash, monkeypatch):
    if device == "cpu" and release == RELEASES[0]:
        pytest.skip("verl 0.8 has no platform for a CPU")
    monkeypatch.setattr(run_stage, "has_flash_attention", lambda: flash)
    spec = {"device": device, "output": "/my out", "gpus": 3, "model": model, "longest": 200 if model else 7}
    spec["tensor_parallel"] = 1 if device == "cpu" else 3
    config_dir = release_folder(release) / "verl" / "trainer" / "config"
    composed = compose(config_dir, run_stage.overrides(spec, Path("/my out/run"), "/tmp/r"))
    assert composed.findings == ()
    values = composed.values
    roles, trainer, data = values["actor_rollout_ref"], values["trainer"], values["data"]
    assert values["verl_fp16"]["train_dtype"] == values["verl_fp16"]["rollout_dtype"] == "float16"
    assert roles["rollout"]["dtype"] == "float16" and roles["actor"]["strategy"] == "fsdp2"
    assert roles["model"]["path"] == (model or "/my out/model")
    assert trainer["default_local_dir"] == "/my out/run/checkpoints" and trainer["n_gpus_per_node"] == 3
    assert (trainer.get("device", "cuda") == "cpu") == (device == "cpu")
    assert trainer["total_training_steps"] == 3 and "file" in trainer["logger"]
    # As verl demands: all ranks get as many answers, in whole micro-batches.
    answers = data["train_batch_size"] * roles["rollout"]["n"]
    mini = roles["actor"]["ppo_mini_batch_size"] * roles["rollout"]["n"] // trainer["n_gpus_per_node"]
    assert answers % trainer["n_gpus_per_node"] == 0 and mini % roles["actor"]["ppo_micro_batch_size_per_gpu"] == 0
    room = roles["rollout"]["max_model_len"]
    assert data["max_prompt_length"] + data["max_response_length"] <= room <= roles["rollout"]["max_num_batched_tokens"]
    assert data["max_prompt_length"] >= spec["longest"]
    sdpa = roles["model"]["override_config"].get("attn_implementation") == "sdpa"
    assert sdpa == (device == "cpu" or not flash)
    # Without a default of verl's: what nobody sets stops verl where it is first read, which may be after minutes.
    assert [key for key, value in flatten(roles) if value == "???"] == []
    assert roles["rollout"]["name"] == "vllm"
    assert roles["rollout"]["tensor_model_parallel_size"] == (3 if model and device == "gpu" else 1)
    assert values["verl_fp16"]["sync"]["audit_interval"] == 1


@pytest.mark.parametrize("gpus", (1, 3, 8))
@pytest.mark.parametrize("device", ("cpu", "gpu"))
@pytest.mark.parametrize("release", RELEASES)
def test_ray_has_a_place_for_every_process_whatever_the_cores(release, device, gpus):
    if device == "cpu" and release == RELEASES[0]:
        pytest.skip("verl 0.8 has no platform for a CPU")
    spec = {"device": device, "output": "/o", "gpus": gpus, "model": None, "longest": 7}
    config_dir = release_folder(release) / "verl" / "trainer" / "config"
    values = compose(config_dir, run_stage.overrides(spec, Path("/o/run"), "/tmp/r")).values
    agents = values["actor_rollout_ref"]["rollout"]["agent"]["num_workers"]
    units = values["transfer_queue"]["backend"]["SimpleStorage"]["num_data_storage_units"]
    assert (agents, values["reward"]["num_workers"], units) == (1, 1, 1)
    # verl reserves three a GPU; the controller and each unit of the queue, verl's driver, agents and rewards have one.
    places = values["ray_kwargs"]["ray_init"]["num_cpus"]
    assert places >= max(12 if device == "cpu" else 16, 3 * gpus + 2 + units + agents + 1)
