"""verl's real FSDP engine on gloo: precision, loss scaler, skip; with the flag, without it, and stock verl."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ranks import on_ranks
from releases import PATCHED, RELEASES, version_of

from verl_fp16.hooks import HOOKS

STRATEGIES = ("fsdp", "fsdp2")
SEQUENCES = [list(range(start, start + 6 + start % 5)) for start in range(8)]


def _local_shards(engine) -> list:
    """This rank's master weights, as the optimizer holds them."""
    shards = []
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            shards.append(local.detach().clone())
    return shards


def _optimizer_state(engine) -> list:
    return [
        (key, (value.to_local() if hasattr(value, "to_local") else value).clone())
        for state in engine.optimizer.state.values()
        for key, value in sorted(state.items())
    ]


def run_calls(calls: dict[str, tuple]) -> dict:
    """Call functions of this module one after the other on this rank: name -> (function's name, arguments)."""
    return {name: globals()[function](*arguments) for name, (function, *arguments) in calls.items()}


@pytest.fixture(scope="module", params=(*RELEASES, PATCHED))
def release(request) -> str:
    """The verl that the engines are of."""
    return request.param


@pytest.fixture(scope="module")
def single_ranks(release, tiny_model, tmp_path_factory) -> list[dict]:
    """Two processes of one rank, at the same time: with the hooks in place, and stock verl on the CPU room alone."""
    model, calls = str(tiny_model), {}
    for strategy in STRATEGIES:
        calls[f"fp16 {strategy}"] = ("train_a_little", model, strategy, "float16", True, 4)
        calls[f"fp32 {strategy}"] = ("train_a_little", model, strategy, "float32", True, 1)
        calls[f"roles {strategy}"] = ("critic_and_reference", model, strategy)
    calls["resume"] = ("saved_and_resumed", model, str(tmp_path_factory.mktemp("checkpoint")))
    calls["no flag"] = ("train_a_little", model, "fsdp2", "bfloat16", False, 3)
    stock = {
        "fault": ("stock_on_fault", model),
        "no flag": calls["no flag"],
        "adapter fsdp": ("exported_adapter_tensors", model, "fsdp"),
        "adapter fsdp2": ("exported_adapter_tensors", model, "fsdp2"),
    }

    def run(name: str, calls: dict, env: dict) -> dict:
        return on_ranks(1, run_calls, calls, folder=tmp_path_factory.mktemp(name), release=release, env=env)[0]

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, ("hooks", "stock"), (calls, stock), ({}, {"VERL_FP16_DISABLE": "1"})))


@pytest.fixture(scope="module")
def one_rank(single_ranks) -> dict:
    return single_ranks[0]


@pytest.fixture(scope="module")
def stock_verl(single_ranks) -> dict:
    return single_ranks[1]


@pytest.fixture(scope="module")
def two_ranks(release, tiny_model, tmp_path_factory) -> list[dict]:
    model, calls = str(tiny_model), {}
    for strategy in STRATEGIES:
        calls[f"fp16 {strategy}"] = ("train_a_little", model, strategy, "float16", True, 4)
        calls[f"fault {strategy}"] = ("skip_on_fault", model, strategy)
        calls[f"fault {strategy} fused"] = ("skip_on_fault", model, strategy, True)
    return on_ranks(2, run_calls, calls, folder=tmp_path_factory.mktemp("two-ranks"), release=release)


def train_a_little(model: str, strategy: str, dtype: str, flag: bool, steps: int) -> dict:
    import torch.distributed as dist

    from verl_fp16 import standalone
    from verl_fp16.hooks import patcher

    precision = standalone.mixed_precision(dtype)
    if not flag:
        del precision["verl_fp16"]
    torch.manual_seed(0)
    engine = standalone.build_engine(model, precision=precision, strategy=strategy)
    mine = SEQUENCES[dist.get_rank() :: dist.get_world_size()]
    metrics = [
        standalone.train_step(engine, standalone.make_batch(mine, micro_batch_size=len(mine) // 2))
        for _ in range(steps)
    ]
    losses = [sum(m["loss"]) if isinstance(m.get("loss"), list) else m.get("loss") for m in metrics]
    return {
        "hooks": patcher.status(),
        "autocast": engine._autocast_dtype,
        "master": {shard.dtype for shard in _local_shards(engine)},
        "mixed_precision": _fsdp_dtypes(engine),
        "scaler": type(engine.scaler).__name__,
        "metrics": metrics,
        "losses": losses,
        "shards": _local_shards(engine),
        "log_probs": standalone.teacher_forced_log_probs(engine, mine, len(mine)),
    }


def _fsdp_dtypes(engine) -> tuple:
    """(parameter, reduce) dtype in force, read from the wrapped module."""
    module = engine.module
    if hasattr(module, "mixed_precision"):
        return module.mixed_precision.param_dtype, module.mixed_precision.reduce_dtype
    policy = module._get_fsdp_state()._mp_policy
    return policy.param_dtype, policy.reduce_dtype


def test_hooks_are_on_the_engine_or_in_its_source(release, one_rank):
    here = {hook.name for hook in HOOKS if hook.name.startswith("engine.") and hook.is_for(version_of(release))}
    engine_hooks = {name: s for name, s in one_rank["fp16 fsdp2"]["hooks"].items() if name in here}
    expected = "not needed: the source of this installation carries it" if release == PATCHED else "applied"
    assert len(engine_hooks) >= 3
    assert set(engine_hooks.values()) == {expected}


@pytest.mark.parametrize("world_size", (1, 2))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp16_engine_runs_what_the_flag_declares(release, request, strategy, world_size):
    ranks = [request.getfixturevalue("one_rank")] if world_size == 1 else request.getfixturevalue("two_ranks")
    for seen in (rank[f"fp16 {strategy}"] for rank in ranks):
        assert seen["autocast"] is torch.float16
        assert seen["master"] == {torch.float32}
        assert seen["mixed_precision"] == (torch.float16, torch.float32)
        assert seen["scaler"] == "LossScaler"
        norms = [m["grad_norm"] for m in seen["metrics"]]
        assert all(norm > 0 for norm in norms), norms
        assert norms[-1] < norms[0], "four steps at lr 1e-3 bring the gradient down"
        assert [m["loss_scale"] for m in seen["metrics"]] == [[65536.0]] * 4
        assert [m["skipped_steps"] for m in seen["metrics"]] == [[0.0]] * 4
        assert all(torch.isfinite(row).all() for row in seen["log_probs"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clipped_norm_is_that_of_the_true_gradient(one_rank, strategy):
    """The norm that is clipped is unscaled: at scale 65536 FP16 sees the norm that FP32 sees, within its rounding."""
    half, full = one_rank[f"fp16 {strategy}"], one_rank[f"fp32 {strategy}"]
    assert half["metrics"][0]["grad_norm"] == pytest.approx(full["metrics"][0]["grad_norm"], rel=5e-3)
    assert full["scaler"] == "NoneType"


def skip_on_fault(model: str, strategy: str, fused: bool = False) -> dict:
    """One clean step, one with an inf in rank 0's gradient alone, one clean step."""
    import torch.distributed as dist

    from verl_fp16 import standalone

    engine = standalone.build_engine(
        model,
        precision=standalone.mixed_precision("float16"),
        strategy=strategy,
        optimizer={"override_optimizer_config": {"fused": True}} if fused else None,
    )
    assert bool(engine.optimizer.defaults.get("fused")) is fused
    mine = SEQUENCES[dist.get_rank() :: dist.get_world_size()]
    batch = standalone.make_batch(mine)
    standalone.train_step(engine, batch)
    before = (_local_shards(engine), _optimizer_state(engine), engine.scaler.scale_value)
    true_step = engine.scaler.unscale_

    def poisoned(optimizer):
        if dist.get_rank() == 0:
            gradient = next(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            local.view(-1)[0] = torch.inf
        true_step(optimizer)

    engine.scaler.unscale_ = poisoned
    skipped = standalone.train_step(engine, standalone.make_batch(mine))
    engine.scaler.unscale_ = true_step
    after = (_local_shards(engine), _optimizer_state(engine), engine.scaler.scale_value)
    applied = standalone.train_step(engine, standalone.make_batch(mine))
    return {"before": before, "after": after, "skipped": skipped, "applied": applied, "end": _local_shards(engine)}


@pytest.mark.parametrize("case", [f"{strategy}{adam}" for strategy in STRATEGIES for adam in ("", " fused")])
def test_fault_on_one_rank_skips_on_all_and_changes_nothing(two_ranks, case):
    for seen in (rank[f"fault {case}"] for rank in two_ranks):
        (shards, state, scale), (shards_after, state_after, scale_after) = seen["before"], seen["after"]
        assert all(torch.equal(a, b) for a, b in zip(shards, shards_after, strict=True))
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(state, state_after, strict=True))
        assert scale_after == scale / 2
        assert seen["skipped"]["grad_norm"] is None, "a skipped step's norm stays out of the mean"
        assert seen["skipped"]["skipped_steps"] == [1.0]
        assert seen["skipped"]["loss_scale"] == [scale / 2]
        assert seen["applied"]["skipped_steps"] == [0.0], "skips are counted for each training step"
        assert not all(torch.equal(a, b) for a, b in zip(shards_after, seen["end"], strict=True))
        assert all(torch.isfinite(shard).all() for shard in seen["end"])


def saved_and_resumed(model: str, folder: str) -> dict:
    """A scale that has moved, and a schedule that a skipped step has not, through a checkpoint of this release."""
    from verl_fp16 import standalone

    fault = {"target": "gradient", "parameter": "lm_head.weight", "updates": [2]}
    precision = standalone.mixed_precision("float16", fault_injection=[fault])
    engine = standalone.build_engine(model, precision=precision)
    epochs = []
    for _ in range(2):
        standalone.train_step(engine, standalone.make_batch(SEQUENCES))
        engine.lr_scheduler_step()
        epochs.append(engine.lr_scheduler.last_epoch)
    engine.save_checkpoint(folder)
    resumed = standalone.build_engine(model, precision=precision)
    resumed.load_checkpoint(folder)
    return {"epochs": epochs, "before": engine.scaler.state_dict(), "after": resumed.scaler.state_dict()}


def test_scale_and_schedule_go_through_a_checkpoint_of_every_release(one_rank):
    seen = one_rank["resume"]
    assert seen["epochs"] == [1, 1]
    assert seen["before"] == seen["after"]
    assert (seen["after"]["scale"], seen["after"]["skipped_total"]) == (32768.0, 1)


def stock_on_fault(model: str) -> bool:
    """Stock verl on the CPU room alone: does an inf gradient reach the weights?"""
    import torch.distributed as dist

    from verl_fp16 import standalone

    precision = standalone.mixed_precision("float16")
    del precision["verl_fp16"]
    engine = standalone.build_engine(model, precision=precision)
    mine = SEQUENCES[dist.get_rank() :: dist.get_world_size()]
    original = engine.optimizer_step

    def poisoned():
        gradient = next(p.grad for p in engine.module.parameters() if p.grad is not None)
        gradient.to_local().view(-1)[0] = torch.inf
        return original()

    engine.optimizer_step = poisoned
    standalone.train_step(engine, standalone.make_batch(mine))
    return all(bool(torch.isfinite(shard).all()) for shard in _local_shards(engine))


def test_stock_verl_lets_the_fault_into_the_weights(stock_verl):
    """The control: without our scaler the same fault destroys the model on this device."""
    assert stock_verl["fault"] is False


def test_without_the_flag_weights_are_bit_identical_to_stock_verl(one_rank, stock_verl):
    with_hooks, stock = one_rank["no flag"], stock_verl["no flag"]
    assert all(torch.equal(a, b) for a, b in zip(with_hooks["shards"], stock["shards"], strict=True))
    assert with_hooks["metrics"] == stock["metrics"]
    assert with_hooks["scaler"] == stock["scaler"] == "NoneType"


def exported_adapter_tensors(model: str, strategy: str) -> int:
    from verl_fp16 import standalone

    engine = standalone.build_engine(model, precision=None, strategy=strategy, lora_rank=8)
    tensors, _ = engine.get_per_tensor_param(base_sync_done=True)
    return len(list(tensors))


def test_lora_needs_fsdp2_in_stock_verl(stock_verl):
    """A limit that the README states: on FSDP1 verl exports no adapter. If this fails, the limit has gone."""
    assert stock_verl["adapter fsdp2"] > 0
    assert stock_verl["adapter fsdp"] == 0


def critic_and_reference(model: str, strategy: str) -> dict:
    from verl_fp16 import standalone

    def value_loss(model_output, data, dp_group=None):
        values = model_output["values"].values().float()
        return ((values - 1.0) ** 2).mean(), {}

    critic = standalone.build_engine(
        model,
        precision=standalone.mixed_precision("float16", role="critic", loss_scale={"init": 1024.0}),
        strategy=strategy,
        model_type="value_model",
    )
    metrics = standalone.train_step(critic, standalone.make_batch(SEQUENCES), loss=value_loss)
    reference = standalone.build_engine(
        model,
        precision=standalone.mixed_precision("float16", role="ref"),
        strategy=strategy,
        forward_only=True,
    )
    rows = standalone.teacher_forced_log_probs(reference, SEQUENCES, 8)
    return {
        "critic": metrics,
        "critic_scaler": type(critic.scaler).__name__,
        "ref_scaler": reference.scaler,
        "ref_autocast": reference._autocast_dtype,
        "finite": all(bool(torch.isfinite(row).all()) for row in rows),
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_critic_has_its_own_scaler_and_the_reference_none(one_rank, strategy):
    seen = one_rank[f"roles {strategy}"]
    assert seen["critic_scaler"] == "LossScaler"
    assert seen["critic"]["loss_scale"] == [1024.0]
    assert seen["critic"]["grad_norm"] > 0
    assert seen["ref_scaler"] is None
    assert seen["ref_autocast"] is torch.float16
    assert seen["finite"]
