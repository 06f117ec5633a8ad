"""What verl's real FSDP engine sends to the rollout: bit for bit the masters in the rollout's dtype, on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from releases import PATCHED, RELEASES

LORA = {"lora_rank": 4, "model": {"lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}}
MERGED = {"lora_rank": 4, "model": {**LORA["model"], "lora": {"merge": True}}}


def build(path: str, strategy: str, flag: bool, **settings: Any) -> Any:
    from verl_fp16.standalone import build_engine, mixed_precision

    precision = mixed_precision("float16") if flag else {"param_dtype": "fp16"}
    engine = build_engine(path, strategy=strategy, precision=precision, **settings)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            # Norms are ones, and adapters half zeros: with these every tensor has values that have to be rounded.
            (parameter.to_local() if hasattr(parameter, "to_local") else parameter).mul_(1.0009).add_(0.00123)
    return engine


def whole_tensor(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """Clones of the whole masters in float32, by the names that verl gives them."""
    return {name: whole_tensor(tensor).detach().clone() for name, tensor in engine.module.state_dict().items()}


def sync(engine: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    weights, _ = engine.get_per_tensor_param(**kwargs)
    return {name: tensor.clone() for name, tensor in weights}


def sent_in_full(model: str, strategy: str, flag: bool) -> dict:
    """Two syncs of full weights: the first as everything is, the second with all names known to be narrow."""
    engine = build(model, strategy, flag)
    result: dict[str, Any] = {"state": state_of(engine), "first": sync(engine)}
    if flag:
        from verl_fp16.weight_sync.rank_calls import sender_of
        from verl_fp16.weight_sync.sender import Learned

        sender = sender_of(engine)
        sender.prepare(digests=True)
        result["first again"] = sync(engine)
        result["first report"] = sender.report()
        sender.learn(Learned(frozenset(result["first"]) - {"model.norm.weight"}))
        sender.prepare(digests=True)
        result["second"] = sync(engine)
        result["report"] = sender.report()
        sender.prepare(digests=False)
        with torch.no_grad():
            for parameter in engine.module.parameters():
                (parameter.to_local() if hasattr(parameter, "to_local") else parameter).mul_(1 + 1e-4)
        sync(engine)
        result["moved"] = sender.report()
    return result


def sent_with_an_overflow(model: str) -> dict:
    from verl_fp16.weight_sync.rank_calls import sender_of

    engine = build(model, "fsdp2", True)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if name == "lm_head.weight":
                local = parameter.to_local()
                local.view(-1)[:3] = 1e5
    sender = sender_of(engine)
    sender.prepare(digests=False)
    sync(engine)
    return sender.report()


def sent_with_lora(model: str, strategy: str, merge: bool, flag: bool) -> dict:
    """A sync of adapters after one of base and adapters, or of merged weights."""
    engine = build(model, strategy, flag, **(MERGED if merge else LORA))
    result: dict[str, Any] = {}
    if merge:
        from verl.utils.fsdp_utils import merged_lora_context, normalize_peft_param_name

        before = state_of(engine)
        with merged_lora_context(engine.module, backup_adapters=True):
            result["state"] = {
                name: whole_tensor(t).detach().clone()
                for name, t in normalize_peft_param_name(engine.module.state_dict()).items()
            }
        result["kinds of sync"] = ["first", "second"]
        assert all(torch.equal(before[name], now) for name, now in state_of(engine).items())
    result["first"] = sync(engine, base_sync_done=True)
    if flag:
        from verl_fp16.weight_sync.rank_calls import sender_of
        from verl_fp16.weight_sync.sender import Learned

        sender = sender_of(engine)
        if not merge:
            result["base"] = sync(engine, base_sync_done=False)
        sender.learn(Learned(frozenset({*result["first"], *result.get("base", ())})))
        sender.prepare(digests=False)
        result["second"] = sync(engine, base_sync_done=True)
        if not merge:
            result["second base"] = sync(engine, base_sync_done=False)
        result["report"] = sender.report()
        if merge:
            assert all(torch.equal(before[name], now) for name, now in state_of(engine).items()), "put back again"
    return result


def run_calls(calls: dict[str, tuple]) -> dict:
    return {name: globals()[function](*arguments) for name, (function, *arguments) in calls.items()}


@pytest.fixture(scope="module", params=[(release, ws) for release in (*RELEASES, PATCHED) for ws in (1, 2)], ids=str)
def ranks(request, tiny_model, tmp_path_factory) -> list[dict]:
    """What each rank sent, with the flag and without, on both kinds of FSDP."""
    release, world_size = request.param
    model = str(tiny_model)
    calls: dict[str, tuple] = {}
    for strategy in ("fsdp", "fsdp2"):
        calls[f"full {strategy}"] = ("sent_in_full", model, strategy, True)
        calls[f"stock {strategy}"] = ("sent_in_full", model, strategy, False)
    if world_size == 2:
        calls["overflow"] = ("sent_with_an_overflow", model)
    calls["adapters"] = ("sent_with_lora", model, "fsdp2", False, True)
    if release != "0.8.0":
        calls["merged fsdp2"] = ("sent_with_lora", model, "fsdp2", True, True)
        calls["stock merged fsdp2"] = ("sent_with_lora", model, "fsdp2", True, False)
        calls["merged fsdp"] = ("sent_with_lora", model, "fsdp", True, True)
    results = on_ranks(world_size, run_calls, calls, folder=tmp_path_factory.mktemp("ranks"), release=release)
    for result in results:
        result["release"], result["world size"] = release, world_size
    return results


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def check_exact(sent: dict[str, torch.Tensor], state: dict[str, torch.Tensor], wide: set[str] = frozenset()) -> None:
    assert sent.keys() == state.keys()
    for name, tensor in sent.items():
        wanted = state[name].float() if name in wide else state[name].to(torch.float16)
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
        assert torch.equal(bits(tensor), bits(wanted)), name


@pytest.mark.parametrize("strategy", ("fsdp", "fsdp2"))
def test_full_weights_are_the_masters_rounded_once(ranks, strategy):
    for rank in ranks:
        run = rank[f"full {strategy}"]
        check_exact(run["first"], run["state"], wide=set(run["state"]))
        check_exact(run["second"], run["state"], wide={"model.norm.weight"})


@pytest.mark.parametrize("strategy", ("fsdp", "fsdp2"))
def test_half_of_the_bytes_are_sent(ranks, strategy):
    run = ranks[0][f"full {strategy}"]
    values = sum(tensor.numel() for tensor in run["state"].values())
    kept = run["state"]["model.norm.weight"].numel()
    assert run["first report"]["bytes"] == 4 * values
    assert run["report"]["bytes"] == 2 * values + 2 * kept
    assert sum(rank[f"full {strategy}"]["report"]["values"]["values"] for rank in ranks) == values, "counted once"


@pytest.mark.parametrize("strategy", ("fsdp", "fsdp2"))
def test_every_rank_digests_the_same_stream(ranks, strategy):
    streams = [rank[f"full {strategy}"]["report"]["stream"] for rank in ranks]
    assert [entry[0] for entry in streams[0]] == list(ranks[0][f"full {strategy}"]["second"])
    assert all(stream == streams[0] for stream in streams)
    assert ranks[0][f"full {strategy}"]["first report"]["stream"] != streams[0]


@pytest.mark.parametrize("strategy", ("fsdp", "fsdp2"))
def test_updates_that_rounding_hides_are_counted(ranks, strategy):
    """A change by 1e-4 is half of float16's last bit at most, and an eighth of bfloat16's."""
    samples = [rank[f"full {strategy}"]["moved"]["sample"] for rank in ranks]
    changed, hidden, hidden_bf16 = (sum(s[key] for s in samples) for key in ("changed", "hidden", "hidden_bf16"))
    assert changed > 100
    assert 0.6 < hidden / changed < 0.95 < hidden_bf16 / changed < 1
    assert all(rank[f"full {strategy}"]["report"]["sample"]["changed"] == 0 for rank in ranks)


def test_stock_verl_sends_float32_or_bfloat16(ranks):
    """0.8.0 rounds what is sharded to bfloat16; the others send twice the bytes."""
    for strategy in ("fsdp", "fsdp2"):
        run = ranks[0][f"stock {strategy}"]
        dtypes = {tensor.dtype for tensor in run["first"].values()}
        if ranks[0]["release"] != "0.8.0" or (strategy == "fsdp" and len(ranks) == 1):
            assert dtypes == {torch.float32}
            continue
        assert dtypes == {torch.bfloat16}
        with pytest.raises(AssertionError):
            check_exact({n: t.to(torch.float16) for n, t in run["first"].items()}, run["state"])


def test_values_that_overflow_are_counted_on_the_rank_that_holds_them(ranks):
    if len(ranks) == 1:
        pytest.skip("one rank")
    faults = [rank["overflow"]["faults"] for rank in ranks]
    assert [list(found) for found in faults] == [["lm_head.weight"]] * 2, "three values on each rank"
    assert [found["lm_head.weight"]["overflow"] for found in faults] == [3, 3]
    assert faults[0]["lm_head.weight"]["max_abs"] == 1e5


def test_adapters_are_rounded_once(ranks):
    for rank in ranks:
        run = rank["adapters"]
        assert run["first"] and all("lora_" in name for name in run["first"])
        check_exact(run["second"], run["first"])
        check_exact(run["second base"], run["base"])
        assert {tensor.dtype for tensor in (*run["first"].values(), *run["base"].values())} == {torch.float32}


@pytest.mark.parametrize("strategy", ("fsdp", "fsdp2"))
def test_merged_adapters_are_rounded_once(ranks, strategy):
    if ranks[0]["release"] == "0.8.0":
        pytest.skip("refused: this release sends them unmerged")
    for rank in ranks:
        run = rank[f"merged {strategy}"]
        check_exact(run["first"], run["state"], wide=set(run["state"]))
        check_exact(run["second"], run["state"])
    stock = ranks[0]["stock merged fsdp2"]["first"]
    assert {tensor.dtype for tensor in stock.values()} == {torch.bfloat16}
