"""Non-finite gradients and outputs by name in verl's real engine: planted at known places, found by who holds them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

WAYS = {
    "fsdp": {"strategy": "fsdp"},
    "fsdp, original parameters": {"strategy": "fsdp", "engine": {"use_orig_params": True}},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2, lora": {"strategy": "fsdp2", "lora_rank": 8},
}
TRACED = ("fsdp", "fsdp2")
NOTED = {
    "model.layers.0.self_attn": "Qwen3Attention",
    "model.layers.0": "Qwen3DecoderLayer",
    "(the model)": "Qwen3ForCausalLM",
}
SEQUENCES = [list(range(start, start + 6 + start % 5)) for start in range(8)]
DOWN, NORM, HEAD = "model.layers.0.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"
LORA = "base_model.model.model.layers.1.mlp.up_proj.{}.default.weight"
LORA_SHAPES = {LORA.format("lora_A"): (8, 64), LORA.format("lora_B"): (128, 8)}
Plants = list[tuple[str, int, float]]


def _units(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """The parameters that FSDP1 flattens together, in order: those of each decoder layer, and the rest."""
    units: dict[str, list[str]] = {}
    for name in shapes:
        units.setdefault(name.split(".")[2] if ".layers." in name else "root", []).append(name)
    return list(units.values())


def held_by_rank(shapes: dict[str, tuple[int, ...]], way: str, world_size: int, rank: int) -> dict[str, range]:
    """The elements of each parameter, counted in its own memory order, of which ``rank`` has the gradient.

    FSDP2 shards each parameter by rows. FSDP1 cuts the flat parameter of a unit into equal parts; with original
    parameters it aligns them to 16 bytes, which those of this model are.
    """
    held = {}
    if way.startswith("fsdp2"):
        for name, shape in shapes.items():
            rows, row = -(-shape[0] // world_size), torch.Size(shape[1:]).numel()
            held[name] = range(rank * rows * row, min((rank + 1) * rows, shape[0]) * row)
        return held
    for unit in _units(shapes):
        sizes = [torch.Size(shapes[name]).numel() for name in unit]
        assert all(size % 4 == 0 for size in sizes)
        part, start = -(-sum(sizes) // world_size), 0
        for name, size in zip(unit, sizes, strict=True):
            held[name] = range(max(rank * part - start, 0), min((rank + 1) * part - start, size))
            start += size
    return held


@pytest.fixture(scope="module")
def shapes(tiny_model) -> dict[str, tuple[int, ...]]:
    from transformers import Qwen3ForCausalLM

    return {name: tuple(p.shape) for name, p in Qwen3ForCausalLM.from_pretrained(tiny_model).named_parameters()}


@pytest.fixture(scope="module")
def plants(shapes) -> dict[str, Plants]:
    """Where each way of sharding gets which value: both ends of parameters, and both sides of the cut between ranks."""
    name, cut = next(
        (name, held.stop)
        for name, held in held_by_rank(shapes, "fsdp", 2, 0).items()
        if ".layers.0." in name and 0 < held.stop < torch.Size(shapes[name]).numel()
    )
    assert name not in (DOWN, NORM, HEAD)
    half = torch.Size(shapes[DOWN]).numel() // 2
    full = [
        (DOWN, 0, torch.inf),
        (DOWN, half - 1, -torch.inf),
        (DOWN, half, torch.nan),
        (DOWN, 2 * half - 1, torch.inf),
        (NORM, 3, torch.nan),
        (HEAD, torch.Size(shapes[HEAD]).numel() - 1, torch.inf),
    ]
    full += [(name, index, torch.inf) for index in (cut - 3, cut - 1, cut)]
    lora = [(LORA.format("lora_A"), 255, torch.inf), (LORA.format("lora_A"), 256, torch.nan)]
    lora += [(LORA.format("lora_B"), 1023, torch.nan)]
    return {way: lora if "lora" in way else full for way in WAYS}


@pytest.fixture(scope="module")
def overflowing_model(tiny_model, tmp_path_factory) -> Path:
    """The model with weights in layer 1 that FP16 can hold and whose product with the activations it cannot."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("overflowing-model")
    model = Qwen3ForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1000)
        model.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def worlds(tiny_model, overflowing_model, plants, tmp_path_factory) -> dict[int, list[dict]]:
    """World size -> what each rank saw; the worlds run at the same time."""

    def run(world_size: int) -> list[dict]:
        folder = tmp_path_factory.mktemp(f"world-{world_size}")
        return on_ranks(world_size, run_all, str(tiny_model), str(overflowing_model), plants, folder=folder)

    with ThreadPoolExecutor() as pool:
        return dict(zip((1, 2), pool.map(run, (1, 2)), strict=True))


def run_all(model: str, overflowing: str, plants: dict[str, Plants]) -> dict:
    seen = {f"gradients {way}": planted_step(model, WAYS[way], plants[way]) for way in WAYS}
    for strategy in TRACED:
        seen[f"overflow {strategy}"] = traced_steps(overflowing, strategy, traced=True, steps=1)
        seen[f"traced {strategy}"] = traced_steps(model, strategy, traced=True)
        seen[f"untraced {strategy}"] = traced_steps(model, strategy, traced=False)
    return seen


def _build(model: str, **options):
    from verl_fp16 import standalone

    torch.manual_seed(0)
    precision = standalone.mixed_precision("float16", loss_scale={"init": 1024.0})
    return standalone.build_engine(model, precision=precision, **options)


def _batch(micro_batches: int = 1):
    import torch.distributed as dist

    from verl_fp16 import standalone

    mine = SEQUENCES[dist.get_rank() :: dist.get_world_size()]
    return standalone.make_batch(mine, micro_batch_size=len(mine) // micro_batches)


def planted_step(model: str, options: dict, plants: Plants) -> dict:
    """One step in which the last rank's gradient of the whole parameter, before it is reduced, has the plants."""
    import torch.distributed as dist

    from verl_fp16 import standalone
    from verl_fp16.attribution import non_finite_gradients

    engine = _build(model, **options)
    handles = []

    def plant(index: int, value: float):
        def planted(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            gradient.view(-1)[index] = value
            return gradient

        return planted

    def when_unsharded(parameter: str, index: int, value: float):
        return lambda module, args: handles.append(getattr(module, parameter).register_hook(plant(index, value)))

    modules = {name.replace("_fsdp_wrapped_module.", ""): module for name, module in engine.module.named_modules()}
    if dist.get_rank() == dist.get_world_size() - 1:
        for name, index, value in plants:
            owner, _, parameter = name.rpartition(".")
            handles.append(modules[owner].register_forward_pre_hook(when_unsharded(parameter, index, value)))
    found = {}
    true_unscale = engine.scaler.unscale_

    def unscale(optimizer):
        true_unscale(optimizer)
        found["planted"] = non_finite_gradients(engine.module)

    engine.scaler.unscale_ = unscale
    metrics = standalone.train_step(engine, _batch())
    for handle in handles:
        handle.remove()
    found["skipped"] = metrics["skipped_steps"]
    engine.scaler.unscale_ = lambda optimizer: (
        true_unscale(optimizer),
        found.update(clean=non_finite_gradients(engine.module)),
    )
    standalone.train_step(engine, _batch())
    return found


def traced_steps(model: str, strategy: str, *, traced: bool, steps: int = 2) -> dict:
    """Training steps of two micro-batches with gradient checkpointing."""
    from verl_fp16 import standalone
    from verl_fp16.module_trace import ModuleTrace

    engine = _build(model, strategy=strategy)
    inner = next(module for module in engine.module.modules() if hasattr(module, "gradient_checkpointing_enable"))
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Not the last one of a layer: that is not finished when all that the backward pass needs has been computed again.
    attention = next(module for module in engine.module.modules() if type(module).__name__ == "Qwen3Attention")
    calls = []
    attention.register_forward_hook(lambda *_: calls.append(torch._C._current_graph_task_id() != -1))
    hooks = [len(module._forward_hooks) for module in engine.module.modules()]
    trace = ModuleTrace(engine.module)
    if traced:
        trace.start()
    metrics = [standalone.train_step(engine, _batch(micro_batches=2)) for _ in range(steps)]
    trace.stop()
    assert hooks == [len(module._forward_hooks) for module in engine.module.modules()]
    shards = [p.to_local() if hasattr(p, "to_local") else p for p in engine.module.parameters()]
    return {
        "first": trace.first_non_finite(),
        "noted": [(c.module, c.kind) for c in trace._calls if c.module in NOTED],
        "calls": calls,
        "norms": [m["grad_norm"] for m in metrics],
        "losses": [m.get("loss") for m in metrics],
        "shards": [shard.detach().clone() for shard in shards],
    }


@pytest.mark.parametrize("world_size", (1, 2))
@pytest.mark.parametrize("way", WAYS)
def test_exactly_the_ranks_that_hold_the_planted_elements_name_them(worlds, shapes, plants, way, world_size):
    every_plant = 0
    for rank, seen in enumerate(worlds[world_size]):
        held = held_by_rank(LORA_SHAPES if "lora" in way else shapes, way, world_size, rank)
        expected = set()
        for name in {name for name, _, _ in plants[way]}:
            values = [value for plant, index, value in plants[way] if plant == name and index in held[name]]
            nan = sum(value != value for value in values)
            if values:
                expected.add((name, len(values) - nan, nan, len(held[name])))
            every_plant += len(values)
        found = seen[f"gradients {way}"]["planted"]
        assert {(g.parameter, g.infinite, g.nan, g.elements) for g in found} == expected
        assert len(found) == len(expected)
    assert every_plant == len(plants[way])


def test_the_plants_are_on_both_ranks_and_on_both_sides_of_the_cut(shapes, plants):
    for way in WAYS:
        ranks = [held_by_rank(LORA_SHAPES if "lora" in way else shapes, way, 2, rank) for rank in (0, 1)]
        on_both = [
            n for n, _, _ in plants[way] if all(any(p == n and i in h[n] for p, i, _ in plants[way]) for h in ranks)
        ]
        assert on_both, way


@pytest.mark.parametrize("world_size", (1, 2))
@pytest.mark.parametrize("way", WAYS)
def test_the_planted_step_is_skipped_and_the_next_one_is_clean(worlds, way, world_size):
    for seen in worlds[world_size]:
        assert seen[f"gradients {way}"]["skipped"] == [1.0]
        assert seen[f"gradients {way}"]["clean"] == []


@pytest.mark.parametrize("world_size", (1, 2))
@pytest.mark.parametrize("strategy", TRACED)
def test_the_module_that_overflows_comes_first(worlds, strategy, world_size):
    for seen in worlds[world_size]:
        first = seen[f"overflow {strategy}"]["first"]
        assert (first.module, first.kind) == ("model.layers.1.mlp.down_proj", "Linear")
        assert first.infinite > 0 and first.nan == 0
        assert first.non_finite_inputs == 0
        assert 1 < first.largest_input < 65504
        assert seen[f"traced {strategy}"]["first"] is None


@pytest.mark.parametrize("world_size", (1, 2))
@pytest.mark.parametrize("strategy", TRACED)
def test_training_is_bit_identical_with_and_without_the_trace(worlds, strategy, world_size):
    for seen in worlds[world_size]:
        traced, untraced = seen[f"traced {strategy}"], seen[f"untraced {strategy}"]
        assert traced["losses"] == untraced["losses"]
        assert traced["norms"] == untraced["norms"]
        assert all(torch.equal(a, b) for a, b in zip(traced["shards"], untraced["shards"], strict=True))


@pytest.mark.parametrize("strategy", TRACED)
def test_only_forward_passes_are_noted_and_not_what_checkpointing_computes_again(worlds, strategy):
    for seen in worlds[1] + worlds[2]:
        assert seen[f"traced {strategy}"]["calls"].count(True) > 0, "layers are computed again"
        # Once for each micro-batch of both steps: what wraps a module is not another one of its name.
        assert seen[f"traced {strategy}"]["noted"] == 4 * list(NOTED.items())
        assert seen[f"untraced {strategy}"]["noted"] == []
