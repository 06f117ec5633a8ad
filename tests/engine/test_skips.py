"""Skipped updates in verl's real engine and worker: what is left untouched, told and counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import PARAMETER, STRATEGIES, make_engine, mine, run_calls, same, skips_in, state_of, train
from ranks import on_ranks

ADAMS = {"foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("skips")


@pytest.fixture(scope="module")
def two_ranks(tiny_model, tmp_path_factory, folder) -> list[dict]:
    model, calls = str(tiny_model), {}
    for strategy in STRATEGIES:
        for name, arguments in ADAMS.items():
            calls[f"fault {strategy} {name}"] = ("fault_on_both_ranks", model, strategy, arguments)
        calls[f"rank {strategy}"] = ("faults_of_single_ranks", model, strategy, str(folder / strategy))
    calls["offload"] = ("fault_under_offload", model)
    calls["lora"] = ("fault_with_lora", model)
    calls["no gradient"] = ("a_rank_without_gradients", model)
    calls["bad fault"] = ("fault_nobody_holds", model)
    return on_ranks(2, run_calls, __name__, calls, folder=tmp_path_factory.mktemp("two-ranks"))


@pytest.fixture(scope="module")
def one_rank(tiny_model, tmp_path_factory, folder) -> dict:
    model, calls = str(tiny_model), {}
    for strategy in STRATEGIES:
        calls[f"norm {strategy}"] = ("norm_that_overflows", model, strategy, str(folder / f"norm-{strategy}"))
    calls["forward"] = ("faults_of_the_forward_pass", model, str(folder / "forward"))
    calls["module"] = ("module_that_overflows", model, str(folder / "module"))
    calls["critic"] = ("critic_with_faults", model, str(folder / "critic"))
    calls["schedule"] = ("schedule_over_skips", model)
    calls["worker"] = ("metrics_of_verls_worker", model)
    calls["half base"] = ("adapters_on_a_half_precision_base", model)
    return on_ranks(1, run_calls, __name__, calls, folder=tmp_path_factory.mktemp("one-rank"))[0]


def fault_on_both_ranks(model: str, strategy: str, adam: dict) -> dict:
    faults = [{"target": "gradient", "parameter": PARAMETER, "rank": rank, "updates": [2]} for rank in (0, 1)]
    engine = make_engine(model, strategy, faults=faults, optimizer={"override_optimizer_config": adam})
    assert all(engine.optimizer.defaults.get(name) is value for name, value in adam.items())
    train(engine)
    before = state_of(engine)
    skipped = train(engine)
    after = state_of(engine)
    applied = train(engine)
    end = state_of(engine)
    return {
        "kept": same(before, after),
        "learned": not same(after, end),
        "finite": all(torch.isfinite(tensor).all() for _, tensor in end),
        "skipped": skipped,
        "applied": applied,
    }


@pytest.mark.parametrize("adam", ADAMS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fault_on_both_ranks_leaves_weights_and_optimizer_to_the_bit(two_ranks, strategy, adam):
    for seen in (rank[f"fault {strategy} {adam}"] for rank in two_ranks):
        assert seen["kept"] and seen["learned"] and seen["finite"]
        assert seen["skipped"]["grad_norm"] is None
        assert seen["skipped"]["skipped_steps"] == [1.0] and seen["skipped"]["applied_steps"] == [0.0]
        assert seen["skipped"]["consecutive_skips"] == [1.0] and seen["skipped"]["skipped_total"] == [1.0]
        assert seen["skipped"]["loss_scale"] == [32768.0]
        assert seen["applied"]["consecutive_skips"] == [0.0] and seen["applied"]["skipped_total"] == [1.0]
        assert seen["applied"]["skipped_steps"] == [0.0] and seen["applied"]["applied_steps"] == [1.0]
        assert seen["applied"]["grad_norm"] > 0


def fault_under_offload(model: str) -> dict:
    found = {}
    fault = [{"target": "gradient", "parameter": PARAMETER, "rank": 1, "updates": [2]}]
    for name, engine_settings in {
        "parameters and optimizer": {"param_offload": True, "optimizer_offload": True},
        "policy": {"offload_policy": True},
    }.items():
        for strategy in STRATEGIES if "policy" not in name else ("fsdp2",):
            engine = make_engine(model, strategy, faults=fault, engine=engine_settings)
            train(engine)
            before = state_of(engine)
            train(engine)
            kept = same(before, state_of(engine))
            train(engine)
            found[f"{name} {strategy}"] = (kept, not same(before, state_of(engine)))
    return found


def test_a_skip_under_offload_changes_nothing_either(two_ranks):
    for rank in two_ranks:
        assert len(rank["offload"]) == 3
        assert set(rank["offload"].values()) == {(True, True)}


def fault_with_lora(model: str) -> dict:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    fault = [{"target": "gradient", "parameter": name, "rank": 0, "updates": [2]}]
    engine = make_engine(model, "fsdp2", faults=fault, lora_rank=4)
    train(engine)
    before = state_of(engine)
    train(engine)
    kept = same(before, state_of(engine))
    return {"kept": kept, "names": [g["parameter"] for g in engine._verl_fp16_watch.last_skip.gradients]}


def test_a_skip_with_lora_changes_nothing_and_names_the_adapter(two_ranks):
    for rank in two_ranks:
        assert rank["lora"]["kept"]
        assert rank["lora"]["names"] == ["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"]


def a_rank_without_gradients(model: str) -> list[bool]:
    """Rank 1 holds no gradient at all, rank 0 holds one that overflowed, and the other way round."""
    import torch.distributed as dist

    from verl_fp16.loss_scaling import LossScaler
    from verl_fp16.settings import LossScaleSettings

    skipped = []
    for faulty in (0, 1):
        parameter = torch.nn.Parameter(torch.ones(3))
        other = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([parameter, other], lr=0.1)
        if dist.get_rank() == faulty:
            parameter.grad = torch.tensor([1.0, torch.inf, 1.0])
        scaler = LossScaler(LossScaleSettings(), "cpu")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.last_step_skipped and bool((parameter == 1).all()))
    return skipped


def test_a_rank_without_gradients_skips_with_the_others(two_ranks):
    assert [rank["no gradient"] for rank in two_ranks] == [[True, True]] * 2


def faults_of_single_ranks(model: str, strategy: str, folder: str) -> dict:
    """Update 2: a gradient in rank 1's shard; update 4: the loss of rank 0; each but these applied."""
    faults = [
        {"target": "gradient", "parameter": PARAMETER, "rank": 1, "updates": [2], "value": "nan"},
        {"target": "loss", "rank": 0, "updates": [4], "value": "-inf"},
    ]
    engine = make_engine(model, strategy, faults=faults, folder=folder)
    metrics = [train(engine) for _ in range(5)]
    return {"metrics": metrics, "scale": engine.scaler.scale_value, "skips": skips_in(folder)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parameter_shard_and_data_of_a_fault_are_named(two_ranks, strategy):
    for rank in two_ranks:
        seen = rank[f"rank {strategy}"]
        gradient, forward = seen["skips"]
        assert (gradient["update"], gradient["kind"], gradient["scale"], gradient["scale_after"]) == (
            *(2, "gradient"),
            *(65536.0, 32768.0),
        )
        (worst,) = gradient["gradients"]
        assert (worst["parameter"], worst["rank"], worst["nan"], worst["infinite"]) == (PARAMETER, 1, 1, 0)
        assert worst["elements"] > 1
        assert gradient["data_ranks"] is None, "the ranks' gradients are summed"
        assert (forward["update"], forward["kind"], forward["data_ranks"]) == (4, "forward", [0])
        assert forward["scale_after"] == forward["scale"] == 32768.0
        assert seen["scale"] == 32768.0
        assert [m["skipped_steps"][0] for m in seen["metrics"]] == [0, 1, 0, 1, 0]
        assert [m["skipped_forward_steps"][0] for m in seen["metrics"]] == [0, 0, 0, 1, 0]


def norm_that_overflows(model: str, strategy: str, folder: str) -> dict:
    engine = make_engine(model, strategy, folder=folder)
    train(engine)
    before = state_of(engine)
    unscale = engine.scaler.unscale_

    def enlarge(optimizer):
        unscale(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0).add_(1e20)

    engine.scaler.unscale_ = enlarge
    metrics = train(engine)
    return {"kept": same(before, state_of(engine)), "metrics": metrics, "skips": skips_in(folder)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_finite_gradients_whose_norm_overflows_are_a_skip(one_rank, strategy):
    seen = one_rank[f"norm {strategy}"]
    assert seen["kept"], "no update of zeros, which would still decay weights and moments"
    assert seen["metrics"]["skipped_steps"] == [1.0] and seen["metrics"]["grad_norm"] is None
    assert [(skip["kind"], skip["gradients"]) for skip in seen["skips"]] == [("norm", [])]


def faults_of_the_forward_pass(model: str, folder: str) -> dict:
    """Updates 2 and 3: a loss that is not finite; 5: a log-probability of -inf that the loss does not show."""
    from verl_fp16 import standalone

    engine = make_engine(model, "fsdp2", faults=[{"target": "loss", "updates": [2, 3], "value": "nan"}], folder=folder)
    for _ in range(4):
        train(engine)
    before = state_of(engine)

    def blind(model_output, data, dp_group=None):
        model_output["log_probs"].values()[1] = -torch.inf
        return standalone.next_token_loss({"log_probs": model_output["log_probs"].clamp(min=-20)}, data)

    train(engine, loss=blind)
    kept = same(before, state_of(engine))
    train(engine)
    return {"kept": kept, "skips": skips_in(folder), "scale": engine.scaler.scale_value}


def test_faults_of_the_forward_pass_leave_the_scale_alone_and_are_looked_into_at_the_second(one_rank):
    seen = one_rank["forward"]
    assert seen["kept"] and seen["scale"] == 65536.0
    assert [(skip["update"], skip["kind"], skip["traced"]) for skip in seen["skips"]] == [
        (2, "forward", False),
        (3, "forward", True),
        (5, "forward", False),
    ]
    assert all(skip["data_ranks"] == [0] and skip["modules"] == {} for skip in seen["skips"])


def module_that_overflows(model: str, folder: str) -> dict:
    found = {}
    for when, settings in {"second": {}, "demand": {"trace_modules": True}}.items():
        engine = make_engine(model, "fsdp2", folder=f"{folder}-{when}", scale={"init": 1.0, **settings})
        with torch.no_grad():
            engine.module.model.layers[1].mlp.down_proj.weight.mul_(1e9)
        before = state_of(engine)
        for _ in range(2):
            train(engine)
        hooks = sum(len(m._forward_hooks) for m in engine.module.modules())
        found[when] = {"skips": skips_in(f"{folder}-{when}"), "kept": same(before, state_of(engine)), "hooks": hooks}
    clean = make_engine(model, "fsdp2")
    found["hooks without"] = sum(len(m._forward_hooks) for m in clean.module.modules())
    return found


@pytest.mark.parametrize(("when", "first_traced"), (("second", 1), ("demand", 0)))
def test_the_module_in_which_the_forward_pass_overflows_is_named(one_rank, when, first_traced):
    seen = one_rank["module"][when]
    assert seen["kept"] and len(seen["skips"]) == 2
    for number, skip in enumerate(seen["skips"]):
        assert skip["kind"] == "forward"
        named = {rank: module["module"] for rank, module in skip["modules"].items()}
        assert named == ({"0": "model.layers.1.mlp.down_proj"} if number >= first_traced else {})
    assert seen["hooks"] == one_rank["module"]["hooks without"], "none is left behind"


def critic_with_faults(model: str, folder: str) -> dict:
    from verl_fp16 import standalone

    def value_loss(model_output, data, dp_group=None):
        return ((model_output["values"].values().float() - 1.0) ** 2).mean(), {}

    faults = [
        {"target": "gradient", "parameter": "score.weight", "updates": [2], "role": "critic"},
        {"target": "loss", "updates": [1], "role": "actor"},
    ]
    torch.manual_seed(0)
    precision = standalone.mixed_precision(
        "float16", role="critic", loss_scale={"init": 64.0}, folder=folder, fault_injection=faults
    )
    engine = standalone.build_engine(model, precision=precision, model_type="value_model")
    metrics = [train(engine, loss=value_loss) for _ in range(3)]
    skips = skips_in(folder, "critic")

    def blind(model_output, data, dp_group=None):
        model_output["values"].values()[1] = torch.nan
        return model_output["values"].values()[:1].float().sum(), {}

    unseen = train(engine, loss=blind)
    return {"metrics": metrics, "skips": skips, "unseen": unseen}


def test_the_critic_has_its_own_faults_counts_and_file(one_rank):
    seen = one_rank["critic"]
    assert [m["skipped_steps"][0] for m in seen["metrics"]] == [0, 1, 0]
    assert [m["loss_scale"][0] for m in seen["metrics"]] == [64, 32, 32]
    (skip,) = seen["skips"]
    assert (skip["role"], skip["gradients"][0]["parameter"]) == ("critic", "score.weight")
    assert skip["data_ranks"] == [0], "one rank: it is known whose data it was"
    assert seen["unseen"]["skipped_forward_steps"] == [1.0], "a value that is not finite, which the loss does not show"


def schedule_over_skips(model: str) -> dict:
    """Three training steps of two mini-batches: one skipped, both skipped, none skipped."""
    found = {}
    for hold in (True, False):
        faults = [{"target": "gradient", "parameter": PARAMETER, "updates": [2, 3, 4]}]
        engine = make_engine(
            model,
            "fsdp2",
            faults=faults,
            scale={"hold_lr_on_skip": hold},
            optimizer={"lr_scheduler_type": "cosine", "total_training_steps": 10, "min_lr_ratio": 0.0},
        )
        rates = []
        for _ in range(3):
            train(engine, last_of_step=False)
            metrics = train(engine)
            rates.append((engine.lr_scheduler_step(), engine.lr_scheduler.last_epoch, metrics["skipped_steps"][0]))
        found[hold] = rates
    return found


def test_a_step_without_any_update_holds_the_schedule(one_rank):
    held, stock = one_rank["schedule"][True], one_rank["schedule"][False]
    assert [skipped for _, _, skipped in held] == [1.0, 2.0, 0.0]
    assert [epoch for _, epoch, _ in held] == [1, 1, 2]
    assert [epoch for _, epoch, _ in stock] == [1, 2, 3]
    assert held[1][0] == held[0][0] and held[2][0] == stock[1][0] < stock[0][0]


def metrics_of_verls_worker(model: str) -> list[dict]:
    """Through verl's own ``TrainingWorker`` methods, as its metrics reach the trainer: 3 mini-batches a step."""
    from types import SimpleNamespace

    from verl.utils import tensordict_utils as tu
    from verl.utils.metric import reduce_metrics
    from verl.utils.py_functional import append_to_dict
    from verl.workers.engine_workers import TrainingWorker

    from verl_fp16 import standalone

    engine = make_engine(model, "fsdp2", faults=[{"target": "gradient", "parameter": PARAMETER, "updates": [2]}])
    worker = SimpleNamespace(engine=engine, device_name="cpu", flops_counter=None)

    def loss_with_metrics(model_output, data, dp_group=None):
        loss, _ = standalone.next_token_loss(model_output, data)
        if engine.scaler.update_number in (4, 7, 8, 9):
            loss = loss * torch.nan
        return loss, {"pg_loss": [loss.item()]}

    steps = []
    for _ in range(3):
        collected: dict = {}
        for number in range(3):
            batch = standalone.make_batch(mine(), last_of_step=number == 2)
            with engine.train_mode():
                output = engine.train_batch(batch, loss_with_metrics)
            output.pop("model_output", None)
            final = TrainingWorker._postprocess_output(
                worker, output, global_token_num=None, delta_time=1.0, forward_only=False, images_seqlens=None
            )
            metrics = tu.get(final, "metrics")
            append_to_dict(collected, {k: v for k, v in metrics.items() if not k.startswith("perf/")})
        steps.append(reduce_metrics({k: [x for v in vs for x in _flat(v)] for k, vs in collected.items()}))
    return steps


def _flat(value) -> list:
    return [x for v in value for x in _flat(v)] if isinstance(value, list) else [value]


def test_metrics_of_a_step_are_those_of_its_good_mini_batches(one_rank):
    first, second, third = one_rank["worker"]
    assert all(value == value and abs(value) < 1e6 for step in one_rank["worker"] for value in step.values())
    assert first["skipped_steps"] == 1.0 and first["applied_steps"] == 2.0
    assert second["skipped_steps"] == second["skipped_forward_steps"] == 1.0
    assert first["grad_norm"] > 0 and first["loss"] > 0 and second["loss"] > 0 and second["pg_loss"] > 0
    assert third["skipped_steps"] == third["consecutive_skips"] == 3.0 and third["skipped_total"] == 5.0
    assert not {"grad_norm", "loss", "pg_loss"} & third.keys(), "of a step without any there is nothing to tell"
    assert third["loss_scale"] == 32768.0


def fault_nobody_holds(model: str) -> list[str]:
    """Faults that rank 1 alone fails to plant, and one for a rank that is not there; the engine goes on after them."""
    from verl_fp16.fault_injection import FaultInjectionError

    told = []
    for fault in ({"parameter": "lm_heat", "rank": 1}, {"parameter": PARAMETER, "rank": 2}):
        try:
            engine = make_engine(model, "fsdp2", faults=[{"target": "gradient", "updates": [1], **fault}])
            train(engine)
        except FaultInjectionError as error:
            told.append(str(error))
    return told


def test_a_fault_that_cannot_be_planted_is_an_error_on_all_ranks_that_lists_what_can(two_ranks):
    for rank in two_ranks:
        nobody, nowhere = rank["bad fault"]
        assert "rank 1 of the actor holds no gradient of 'lm_heat'; it holds those of lm_head.weight, model." in nobody
        assert "rank 2: the actor has ranks 0 to 1" in nowhere


def adapters_on_a_half_precision_base(model: str) -> dict:
    from verl_fp16 import standalone

    found = {}
    for strategy in STRATEGIES:
        for flag in (True, False):
            precision = standalone.mixed_precision("float16")
            if not flag:
                del precision["verl_fp16"]
            engine = standalone.build_engine(
                model, precision=precision, strategy=strategy, lora_rank=4, engine={"model_dtype": "fp16"}
            )
            trained = {p.dtype for group in engine.optimizer.param_groups for p in group["params"] if p.requires_grad}
            if flag:
                train(engine)
            found[strategy, flag] = (trained, {p.dtype for p in engine.module.parameters() if not p.requires_grad})
    return found


def test_adapters_have_float32_masters_on_a_half_precision_base(one_rank):
    for strategy in STRATEGIES:
        assert one_rank["half base"][strategy, True] == ({torch.float32}, {torch.float16})
        assert one_rank["half base"][strategy, False][0] == {torch.float16}, "the control: stock verl"
