"""The CPU room: CPU autocast with CUDA's numerics, the distribution name, the choice."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from releases import RELEASES, release_environment

from verl_fp16.cpu import autocast, choice
from verl_fp16.cpu.device import no_accelerator


@pytest.fixture
def float32_softmax():
    autocast.keep_softmax_in_float32()
    yield
    autocast.undo()


@pytest.mark.parametrize("half", (torch.float16, torch.bfloat16))
def test_before_applied_undone(half):
    logits = torch.randn(4, 9, dtype=half)

    def dtypes() -> list[torch.dtype]:
        with torch.autocast("cpu", dtype=half):
            outputs = (
                torch.log_softmax(logits, -1),
                torch.softmax(logits, -1),
                torch.nn.functional.log_softmax(logits, dim=-1),
                torch.logsumexp(logits, -1),
                logits.softmax(-1),
            )
        return [output.dtype for output in outputs]

    before = dtypes()
    assert half in before
    autocast.keep_softmax_in_float32()
    assert dtypes() == [torch.float32] * 5
    autocast.undo()
    assert dtypes() == before


def test_values_and_gradient_are_those_of_float32(float32_softmax):
    logits = torch.randn(5, 11, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        log_probs = torch.log_softmax(logits, -1)
    assert torch.equal(log_probs, torch.log_softmax(logits.float(), -1))
    log_probs[:, 3].sum().backward()
    reference = logits.detach().clone().requires_grad_()
    torch.log_softmax(reference.float(), -1)[:, 3].sum().backward()
    assert torch.equal(logits.grad, reference.grad)


def test_nothing_changes_outside_autocast_nor_for_float32(float32_softmax):
    half = torch.randn(3, 5, dtype=torch.float16)
    assert torch.softmax(half, -1).dtype is torch.float16
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.softmax(half.double(), -1).dtype is torch.float64
        assert torch.softmax(half, -1, dtype=torch.float64).dtype is torch.float64


def test_entropy_and_log_probs_of_verl_are_float32_under_autocast(float32_softmax):
    import verl.utils.torch_functional as verl_F

    logits, labels = torch.randn(6, 17, dtype=torch.bfloat16), torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert verl_F.entropy_from_logits(logits).dtype is torch.float32
        assert verl_F.logprobs_from_logits(logits, labels).dtype is torch.float32


def test_the_choice_reaches_the_run_environment_and_spares_what_the_user_set(monkeypatch):
    for name in ("VERL_PLATFORM", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, "restored at the end")
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    config = OmegaConf.create(
        {
            "trainer": {"device": "cpu"},
            "ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": {"VERL_PLATFORM": "x"}}}},
        }
    )
    OmegaConf.set_struct(config, True)
    assert choice.chosen_by_config(config)
    choice.hand_on_to_workers(config)
    env = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert env == {"VERL_PLATFORM": "x", "VLLM_CPU_KVCACHE_SPACE": "7", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    assert choice.chosen_by_environment()


def test_another_device_is_not_the_choice():
    assert not choice.chosen_by_config(OmegaConf.create({"trainer": {"device": "cuda"}}))


def test_vllm_cpu_is_found_as_vllm_in_a_process_that_chose_the_cpu():
    code = (
        "import importlib.metadata as m\n"
        "try: m.version('vllm'); print('real')\n"
        "except m.PackageNotFoundError: print('missing')\n"
        "from verl_fp16.cpu.distribution import find_vllm_cpu_as_vllm as f; f(); f()\n"
        "print(m.version('vllm') == m.version('vllm-cpu') + '+cpu', m.distribution('vllm').metadata['Name'])\n"
        "print([d.metadata['Name'] for d in m.distributions()].count('vllm'))\n"
        "print(len(m.distribution('vllm').entry_points) == len(m.distribution('vllm-cpu').entry_points))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert out[:4] == ["missing", "True vllm", "0", "True"]


@pytest.mark.parametrize(
    ("release", "broken"),
    (
        (RELEASES[-1], "verl_fp16.cpu.autocast"),
        (RELEASES[-1], "verl_fp16.cpu.wrappers"),
        (RELEASES[-1], "verl_fp16.cpu.platform"),
        ("0.8.0", "verl_fp16.cpu.device"),
    ),
)
def test_a_broken_room_is_an_error_with_its_cause_where_the_cpu_was_chosen(release, broken):
    """verl swallows a plugin's error; without this the process would go on on another device."""
    code = (
        f"import sys; sys.modules[{broken!r}] = None\n"
        "import verl\n"
        "from verl.utils.device import get_device_name\n"
        "print('device', get_device_name())\n"
    )
    env = {**os.environ, **release_environment(release), "VERL_PLATFORM": "cpu"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert process.returncode != 0, process.stdout
    assert "CpuRoomNotActive" in process.stderr
    assert broken in process.stderr


def test_a_verl_without_platforms_sees_the_cpu_alone_until_undone():
    """What the hook for verl 0.8 does, on a module that looks as verl.utils.device does on a machine with a GPU."""
    cuda = object()
    module = SimpleNamespace(is_cuda_available=True, is_npu_available=False, get_torch_device=cuda)
    undo = no_accelerator(module)
    assert module.is_cuda_available is False
    assert module.get_torch_device().current_device() == torch.device("cpu")
    assert module.get_torch_device().mem_get_info()[0] > 0, "torch.cpu has no memory statistics"
    undo()
    assert vars(module) == {"is_cuda_available": True, "is_npu_available": False, "get_torch_device": cuda}


@pytest.mark.parametrize(
    ("hidden", "slots", "named"),
    (("", 2, "-1,-1"), ("NoDevFiles", 1, "-1"), ("0,1", 2, "0,1"), ("", None, ""), (None, 2, None)),
)
def test_gpus_that_are_hidden_stay_so_and_ray_has_its_logical_ones(hidden, slots, named, monkeypatch):
    """Ray refuses to start with more GPUs than the variable names, also with logical ones."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    choice.keep_gpus_hidden(slots)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == named
