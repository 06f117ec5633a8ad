"""Without the flag, verl's FSDP engine trains bit for bit as verl on the CPU room alone, in every role and precision.

Two ranks on gloo, once with all hooks in place and once with none; FSDP1 and FSDP2, actor and critic.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys

import pytest
import torch
from ranks import on_ranks

from verl_fp16.hooks import HOOKS
from verl_fp16.patching.chain import is_wrapped_by

STEPS = 3
SEQUENCES = [list(range(start, start + 6 + start % 5)) for start in range(8)]

STRATEGIES = ("fsdp", "fsdp2")
ROLES = ("language_model", "value_model")
# verl's default, verl's own FP16 keys, and the same with verl's scaler alive: it disables itself on devices other than
# cuda, where the hooks meet it scaling and skipping.
PRECISIONS = {
    "bf16 by default": None,
    "fp16 by verl's keys": {"param_dtype": "fp16"},
    "fp16, scaler alive": {"param_dtype": "fp16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
}
OVERFLOWS_ONCE = {"init_scale": 2.0**30, "backoff_factor": 2.0**-20}
CASES = list(itertools.product(STRATEGIES, ROLES, PRECISIONS))


def train_every_case(model: str) -> dict:
    """Case -> what this rank saw; and under ``held by verl`` the hooks in place in this process."""
    seen = {}
    for strategy, role, precision in CASES:
        seen[strategy, role, precision] = _train(model, strategy, role, precision)
    seen["held by verl"] = sorted(hook.name for hook in HOOKS if _is_held(hook))
    return seen


def _is_held(hook) -> bool:
    """Whether the target, as this process has it, is the hook's wrap."""
    target = sys.modules.get(hook.target.module)
    for name in hook.target.qualname.split("."):
        target = getattr(target, name, None)
    return is_wrapped_by(hook.name, target)


def _train(model: str, strategy: str, role: str, precision: str) -> dict:
    from torch.distributed.fsdp import sharded_grad_scaler

    original = sharded_grad_scaler.ShardedGradScaler
    if precision == "fp16, scaler alive":
        sharded_grad_scaler.ShardedGradScaler = functools.partial(original, device="cpu", **OVERFLOWS_ONCE)
    try:
        return _steps(model, strategy, role, PRECISIONS[precision])
    finally:
        sharded_grad_scaler.ShardedGradScaler = original


def _steps(model: str, strategy: str, role: str, mixed_precision: dict | None) -> dict:
    import torch.distributed as dist

    from verl_fp16 import standalone

    torch.manual_seed(0)
    engine = standalone.build_engine(model, precision=mixed_precision, strategy=strategy, model_type=role)
    mine = SEQUENCES[dist.get_rank() :: dist.get_world_size()]
    loss = standalone.next_token_loss if role == "language_model" else value_loss
    metrics, scales = [], []
    for step in range(STEPS):
        batch = standalone.make_batch(mine, micro_batch_size=2, last_of_step=step % 2 == 0)
        metrics.append(standalone.train_step(engine, batch, loss=loss))
        scales.append(engine.scaler.state_dict() if engine.scaler is not None else None)
    parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
    return {
        "weights": [_local(p) for p in parameters],
        "optimizer": [{k: _local(v) for k, v in engine.optimizer.state[p].items()} for p in parameters],
        "learning rates": [group["lr"] for group in engine.optimizer.param_groups],
        "metrics": metrics,
        "scaler": type(engine.scaler).__name__,
        "scales": scales,
        "autocast": engine._autocast_dtype,
        "random numbers": torch.get_rng_state(),
        "attributes": sorted(vars(engine)),
    }


def value_loss(model_output, data, dp_group=None):
    values = model_output["values"].values().float()
    return ((values - 1.0) ** 2).mean(), {}


def _local(value):
    value = value.to_local() if hasattr(value, "to_local") else value
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module")
def installed(tiny_model, tmp_path_factory) -> list[dict]:
    return on_ranks(2, train_every_case, str(tiny_model), folder=tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory) -> list[dict]:
    folder, env = tmp_path_factory.mktemp("plain"), {"VERL_FP16_DISABLE": "1"}
    return on_ranks(2, train_every_case, str(tiny_model), folder=folder, env=env)


def same(a, b) -> bool:
    """Equal in every bit: a NaN equals the same NaN, and 0.0 does not equal -0.0."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)


def test_one_side_has_the_hooks_and_the_other_has_none(installed, plain):
    on_engines = [hook.name for hook in HOOKS if hook.target.module.startswith("verl.workers.engine.")]
    assert on_engines
    for rank in installed:
        assert set(on_engines) <= set(rank["held by verl"])
    assert [rank["held by verl"] for rank in plain] == [[], []]


@pytest.mark.parametrize(("strategy", "role", "precision"), CASES)
def test_bit_identical_without_the_flag(installed, plain, strategy, role, precision):
    for with_hooks, without in zip(installed, plain, strict=True):
        with_hooks, without = with_hooks[strategy, role, precision], without[strategy, role, precision]
        assert with_hooks.keys() == without.keys()
        assert [name for name in with_hooks if not same(with_hooks[name], without[name])] == []


@pytest.mark.parametrize(("strategy", "role"), itertools.product(STRATEGIES, ROLES))
def test_what_was_compared_is_training(installed, strategy, role):
    """The control: the cases differ from each other, and verl's own scaler overflowed and stepped."""
    cases = {precision: installed[0][strategy, role, precision] for precision in PRECISIONS}
    default, keys, alive = cases.values()
    assert (default["autocast"], keys["autocast"]) == (torch.bfloat16, torch.float16)
    assert [case["scaler"] for case in cases.values()] == ["NoneType", "ShardedGradScaler", "ShardedGradScaler"]
    assert not same(default["weights"], keys["weights"])
    assert not same(keys["weights"], alive["weights"])
    finite = [math.isfinite(m["grad_norm"]) for m in alive["metrics"]]
    assert finite == [False, *[True] * (STEPS - 1)], "the first step overflows"
    assert [state["scale"] for state in alive["scales"]] == [2.0**10] * STEPS
    for case in cases.values():
        assert any(bool(state) for state in case["optimizer"])
