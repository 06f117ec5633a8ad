"""Ways through verl's FSDP engine that a run may choose, in FP16 against FP32: packing, fused kernels, compilation,
temperature, and FSDP1's deferred gradient sync."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ranks import on_ranks
from releases import RELEASES

HALF_ULP = 2.0**-11  # of FP16, relative
SCALE = 1024.0  # loss scale at which nothing of these models overflows or vanishes in FP16
TEMPERATURES = (1.0, 0.7, 0.1, 1e-3)
TOO_SMALL = (1e-4, 0.0)
MICRO_BATCHES = 8
# (release, number of ranks). verl 0.8.0 defers nothing; on one rank FSDP1 shards nothing, and adds up all the same.
PATHS = ((RELEASES[-1], 1), (RELEASES[0], 1))
DEFERRALS = ((RELEASES[-1], 2), (RELEASES[1], 1))


def _sequences(number: int) -> list[list[int]]:
    """Token sequences of 6 to 19 tokens, others on each rank."""
    import torch.distributed as dist

    random = torch.Generator().manual_seed(100 + dist.get_rank())
    lengths = torch.randint(6, 20, (number,), generator=random).tolist()
    return [torch.randint(5, 250, (length,), generator=random).tolist() for length in lengths]


@contextlib.contextmanager
def _unpatched_model_class() -> Iterator[None]:
    """verl puts fused kernels into the model's class, where the next engine of this process would find them."""
    from transformers import Qwen3ForCausalLM

    forward = Qwen3ForCausalLM.forward
    try:
        yield
    finally:
        Qwen3ForCausalLM.forward = forward


def _loss_with_entropy(factor: float) -> Callable[..., tuple]:
    from verl_fp16 import standalone

    def loss(model_output, data, dp_group=None):
        value, metrics = standalone.next_token_loss(model_output, data, dp_group)
        entropy = model_output["entropy"].values().float().sum() / data["batch_num_tokens"] * data["dp_size"]
        return (value - 0.5 * entropy) * factor, metrics

    return loss


def _count_deferrals(engine) -> list:
    """A list that grows by one with each micro-batch whose gradients are not reduced."""
    module, deferred = engine.module, []
    if hasattr(module, "no_sync"):
        no_sync = module.no_sync
        module.no_sync = lambda: (deferred.append(1), no_sync())[1]
    else:
        switch = module.set_requires_gradient_sync
        module.set_requires_gradient_sync = lambda on: (deferred.append(1) if not on else None, switch(on))[1]
    return deferred


def one_mini_batch(
    model: str,
    dtype: str,
    strategy: str = "fsdp2",
    *,
    flag: bool = True,
    packed: bool = False,
    fused: str = "",
    compiled: bool = False,
    sequences: int = 8,
    same: bool = False,
    micro_batch_size: int = 4,
    scale: float = SCALE,
    always_sync: bool = False,
) -> dict:
    """Log-probs, entropies and this rank's part of the true gradient of one mini-batch, before any update.

    Args:
        same: the first sequence again and again, so that gradients of micro-batches add up and cancel nowhere.
        always_sync: take verl's deferral away from this engine.
    """
    from verl.utils import tensordict_utils as tu

    from verl_fp16 import standalone

    precision = standalone.mixed_precision(dtype, loss_scale={"init": scale})
    if not flag:
        del precision["verl_fp16"]
    with _unpatched_model_class():
        engine = standalone.build_engine(
            model,
            precision=precision,
            strategy=strategy,
            use_remove_padding=packed,
            engine={"use_torch_compile": compiled},
            model={"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": fused}} if fused else None,
        )
        if always_sync:
            engine._gradient_sync_context = lambda *, is_last_micro_batch: contextlib.nullcontext()
        rows = _sequences(1) * sequences if same else _sequences(sequences)
        batch = standalone.make_batch(rows, use_remove_padding=packed, micro_batch_size=micro_batch_size)
        tu.assign_non_tensor(
            batch, use_fused_kernels=bool(fused), calculate_entropy=True, return_model_output=True, temperature=1.0
        )
        deferred = _count_deferrals(engine)
        # Without the flag no scaler of ours multiplies the loss.
        factor = scale if not flag and dtype == "float16" else 1.0
        with engine.train_mode():
            engine.optimizer_zero_grad()
            output = engine.forward_backward_batch(batch, _loss_with_entropy(factor), forward_only=False)
            gradients = [parameter.grad for parameter in engine.module.parameters()]
    assert all(gradient is not None for gradient in gradients)
    local = [(g.to_local() if hasattr(g, "to_local") else g).double().flatten() for g in gradients]
    output = output["model_output"]
    return {
        "log_probs": torch.cat([row[:-1] for row in output["log_probs"].detach().unbind()]),
        "entropy": torch.cat([row[:-1] for row in output["entropy"].detach().unbind()]),
        "gradient": torch.cat(local) / (scale if dtype == "float16" else 1.0),
        "deferred": len(deferred),
    }


def at_temperatures(model: str, dtype: str, packed: bool) -> dict:
    """Log-probs at each temperature."""
    from verl.utils import tensordict_utils as tu

    from verl_fp16 import standalone

    precision = standalone.mixed_precision(dtype)
    engine = standalone.build_engine(model, precision=precision, forward_only=True, use_remove_padding=packed)
    found = {}
    for temperature in (*TEMPERATURES, *TOO_SMALL):
        batch = standalone.make_batch(_sequences(4), use_remove_padding=packed)
        tu.assign_non_tensor(batch, temperature=temperature, return_model_output=True)
        with engine.eval_mode(), torch.no_grad():
            rows = engine.infer_batch(batch)["model_output"]["log_probs"].unbind()
        found[temperature] = torch.cat([row[:-1].double() for row in rows])
    return found


def run_calls(calls: dict[str, tuple]) -> dict:
    """Call functions of this module one after the other: name -> (function's name, arguments, keywords)."""
    return {
        name: globals()[function](*arguments, **keywords) for name, (function, arguments, keywords) in calls.items()
    }


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, str]:
    """The tiny model with logits of up to about 10, as a trained one has; with a head of its own, and with none."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    folders = {}
    for name, tied in (("untied", False), ("tied", True)):
        folder = tmp_path_factory.mktemp(name)
        model = Qwen3ForCausalLM.from_pretrained(tiny_model)
        if tied:
            model.config.tie_word_embeddings = True
            torch.manual_seed(1)
            model = Qwen3ForCausalLM(model.config)
        with torch.no_grad():
            model.model.norm.weight.mul_(16.0)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def _paths(models: dict[str, str], release: str) -> dict[str, tuple]:
    calls = {}
    for dtype in ("float32", "float16", "bfloat16"):
        for packed in (False, True):
            way = "packed" if packed else "padded"
            calls[f"{dtype} {way}"] = ("one_mini_batch", (models["tied"], dtype), {"packed": packed})
            calls[f"{dtype} {way} temperatures"] = ("at_temperatures", (models["untied"], dtype, packed), {})
    # FSDP1 holds its parameters in an order of its own, so its gradients are compared with its own.
    for dtype in ("float32", "float16", "bfloat16"):
        calls[f"{dtype} packed fsdp"] = ("one_mini_batch", (models["tied"], dtype, "fsdp"), {"packed": True})
    for name, keywords in {
        "fused fsdp2": {"fused": "torch"},
        "fused fsdp": {"fused": "torch", "strategy": "fsdp"},
        "compiled": {"compiled": True},
    }.items():
        calls[f"float16 {name}"] = ("one_mini_batch", (models["tied"], "float16"), {"packed": True, **keywords})
    if release != RELEASES[-1]:
        del calls["float16 compiled"]
    return calls


def _deferrals(models: dict[str, str]) -> dict[str, tuple]:
    def call(dtype: str, strategy: str = "fsdp", **keywords) -> tuple:
        many = {"sequences": MICRO_BATCHES, "micro_batch_size": 1, **keywords}
        return "one_mini_batch", (models["untied"], dtype, strategy), many

    return {
        "float16": call("float16"),
        "float16 reduced": call("float16", always_sync=True),
        "float16 no flag": call("float16", flag=False),
        # The loss scale that a run starts with.
        "same": call("float16", same=True, sequences=16, scale=65536.0),
        "same, no flag": call("float16", same=True, sequences=16, scale=65536.0, flag=False),
        "float16 fsdp2": call("float16", "fsdp2", sequences=2),
        "bfloat16": call("bfloat16", sequences=2),
        "bfloat16 no flag": call("bfloat16", sequences=2, flag=False),
    }


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> dict[tuple[str, int], list[dict]]:
    """What every rank returned, by release and number of ranks."""
    plan = {(release, ranks): _paths(models, release) for release, ranks in PATHS}
    plan |= {key: _deferrals(models) for key in DEFERRALS}

    def run(key: tuple[str, int]) -> list[dict]:
        release, ranks = key
        return on_ranks(ranks, run_calls, plan[key], folder=tmp_path_factory.mktemp("ranks"), release=release)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(plan, pool.map(run, plan), strict=True))


@pytest.fixture(params=PATHS, ids=str)
def one_rank(runs, request) -> dict:
    return runs[request.param][0]


@pytest.fixture(params=DEFERRALS, ids=str)
def ranks(runs, request) -> list[dict]:
    return runs[request.param]


def _mean_difference(seen: dict, reference: dict, key: str) -> float:
    return (seen[key] - reference[key]).abs().mean().item()


def _gradient_error(seen: dict, reference: dict) -> float:
    return ((seen["gradient"] - reference["gradient"]).norm() / reference["gradient"].norm()).item()


def _assert_as_exact_as(seen: dict, usual: dict, bfloat16: dict, reference: dict) -> None:
    """As near to FP32 as the usual way in FP16 is, and clearly nearer than BF16, which has 3 bits less.

    Kernels and the order of sums differ from way to way, so errors differ by chance: a quarter is allowed (seen: 5 %).
    Of BF16's error, 8 times FP16's, less than a half may be there.
    """
    for key in ("log_probs", "entropy"):
        error = _mean_difference(seen, reference, key)
        assert error < 1.25 * _mean_difference(usual, reference, key), key
        assert error < 0.5 * _mean_difference(bfloat16, reference, key), key
    error = _gradient_error(seen, reference)
    assert error < 1.25 * _gradient_error(usual, reference)
    assert error < 0.5 * _gradient_error(bfloat16, reference)


def test_packed_sequences_give_the_padded_ones_numbers(one_rank):
    """In FP32 to its rounding of logits near 10; in FP16 no further from FP32 than padded sequences are."""
    reference = one_rank["float32 padded"]
    assert _mean_difference(one_rank["float32 packed"], reference, "log_probs") < 1e-5
    assert _gradient_error(one_rank["float32 packed"], reference) < 1e-5
    _assert_as_exact_as(one_rank["float16 packed"], one_rank["float16 padded"], one_rank["bfloat16 padded"], reference)
    on_fsdp1 = one_rank["float16 packed fsdp"]
    assert torch.equal(on_fsdp1["log_probs"], one_rank["float16 packed"]["log_probs"])
    error = _gradient_error(on_fsdp1, one_rank["float32 packed fsdp"])
    assert error < 0.5 * _gradient_error(one_rank["bfloat16 packed fsdp"], one_rank["float32 packed fsdp"])


@pytest.mark.parametrize("strategy", ("fsdp", "fsdp2"))
def test_fused_kernels_of_torch_are_as_exact_as_the_usual_way(one_rank, strategy):
    """They round the entropy to FP16 at the end, which the usual way does not."""
    seen = one_rank[f"float16 fused {strategy}"]
    assert seen["log_probs"].dtype is torch.float32
    assert seen["entropy"].dtype is torch.float16
    way = "packed" if strategy == "fsdp2" else "packed fsdp"
    usual, bfloat16, reference = (one_rank[f"{dtype} {way}"] for dtype in ("float16", "bfloat16", "float32"))
    _assert_as_exact_as(seen, {**usual, "entropy": usual["entropy"].half()}, bfloat16, reference)


def test_compiled_entropy_is_the_eager_one(runs):
    """Compiled, softmax and logsumexp stay in FP32: the entropy is equal to FP32's rounding of logits near 10."""
    seen = runs[PATHS[0]][0]
    compiled, eager = seen["float16 compiled"], seen["float16 packed"]
    assert compiled["entropy"].dtype is eager["entropy"].dtype is torch.float32
    assert (compiled["entropy"] - eager["entropy"]).abs().max() < 1e-5
    assert torch.equal(compiled["log_probs"], eager["log_probs"])
    _assert_as_exact_as(compiled, eager, seen["bfloat16 packed"], seen["float32 packed"])


@pytest.mark.parametrize("way", ("padded", "packed"))
def test_temperatures_that_the_guard_lets_pass_are_right_in_fp16(one_rank, way):
    """Dividing logits by T multiplies their rounding error by 1/T, and adds the rounding of T and of the quotient."""
    full, half = one_rank[f"float32 {way} temperatures"], one_rank[f"float16 {way} temperatures"]
    largest = 11.0  # of the logits
    for temperature in TEMPERATURES:
        assert torch.isfinite(half[temperature]).all()
        error = (half[temperature] - full[temperature]).abs().max() * temperature
        # T is common to all logits of a log-prob, the quotients of label and maximum are rounded each.
        rounding = 0.0 if temperature == 1.0 else 4 * HALF_ULP * largest
        assert error < 2 * (half[1.0] - full[1.0]).abs().max() + rounding


@pytest.mark.parametrize("way", ("padded", "packed"))
def test_temperatures_that_the_guard_refuses_are_not_finite_in_fp16(one_rank, way):
    """verl clamps the temperature at 1e-8, which is 0 in FP16; logits near 10 over 1e-4 are more than 65,504."""
    full, half = one_rank[f"float32 {way} temperatures"], one_rank[f"float16 {way} temperatures"]
    for temperature in TOO_SMALL:
        assert torch.isfinite(full[temperature]).all()
        assert not torch.isfinite(half[temperature]).all()
    assert one_rank[f"bfloat16 {way} temperatures"][0.0].isfinite().all(), "BF16 has FP32's range"


def test_fsdp1_reduces_after_every_micro_batch_in_fp16(ranks):
    for seen in ranks:
        assert seen["float16"]["deferred"] == 0
        assert torch.equal(seen["float16"]["gradient"], seen["float16 reduced"]["gradient"])


def test_deferred_the_gradients_are_added_up_in_fp16(ranks):
    """The control: without the flag FSDP1 adds a rounding error, and the sum overflows where no summand does."""
    for seen in ranks:
        assert seen["float16 no flag"]["deferred"] == MICRO_BATCHES - 1
        assert _gradient_error(seen["float16 no flag"], seen["float16 reduced"]) > HALF_ULP / 2
        assert not seen["same, no flag"]["gradient"].isfinite().all()
        assert seen["same"]["gradient"].isfinite().all()


def test_where_gradients_are_not_added_up_in_fp16_verl_defers_as_ever(ranks):
    for seen in ranks:
        assert seen["float16 fsdp2"]["deferred"] == 1
        assert seen["bfloat16"]["deferred"] == seen["bfloat16 no flag"]["deferred"] == 1
        assert torch.equal(seen["bfloat16"]["gradient"], seen["bfloat16 no flag"]["gradient"])
