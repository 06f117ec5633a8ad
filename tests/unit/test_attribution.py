"""Non-finite gradients by name: plain modules, and every way of sharding for any rank of a world that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from verl_fp16 import attribution
from verl_fp16.attribution import NonFiniteGradient, count_non_finite, non_finite_gradients
from verl_fp16.module_names import class_in_model, name_in_model

# Values of parameters that tell each element of a model from every other, and from padding.
FIRST_ID = 1000


def _shards(parameters: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    for parameter in parameters:
        yield parameter, parameter.to_local() if hasattr(parameter, "to_local") else parameter.data


@contextmanager
def one_rank_of(world_size: int, rank: int) -> Iterator[None]:
    """This process is ``rank``; its collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Node(nn.Module):
    """Parameters of the given shapes, called p0, p1 and so on."""

    def __init__(self, shapes: list[tuple[int, ...]], **children: nn.Module):
        super().__init__()
        for number, shape in enumerate(shapes):
            self.register_parameter(f"p{number}", nn.Parameter(torch.zeros(shape)))
        for name, child in children.items():
            self.add_module(name, child)


def _number_elements(model: nn.Module) -> dict[str, set[int]]:
    """Give each element of ``model`` an id as its value; name -> ids."""
    ids, following = {}, FIRST_ID
    for name, parameter in model.named_parameters():
        end = following + parameter.numel()
        parameter.data = torch.arange(following, end, dtype=torch.float32).view(parameter.shape)
        ids[name] = set(range(following, end))
        following = end
    return ids


def _shard(model: nn.Module, how: str) -> nn.Module:
    """Blocks are units of their own, as decoder layers are; the rest is the root's."""
    if how == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in [*model.blocks, model]:
            fully_shard(block, mesh=mesh)
        return model
    options = {"use_orig_params": how == "fsdp, original parameters", "device_id": torch.device("cpu")}
    for number, block in enumerate(model.blocks):
        model.blocks[number] = FullyShardedDataParallel(block, **options)
    return FullyShardedDataParallel(model, **options)


SHAPES = st.lists(st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 7), st.integers(1, 5))), min_size=1)


@settings(max_examples=150, deadline=None)
@example(how="fsdp", world_size=2, root=[(4,), (3,)], blocks=[[(5, 3), (2,)]], data=None)
@given(
    how=st.sampled_from(["fsdp", "fsdp, original parameters", "fsdp2"]),
    world_size=st.integers(1, 4),
    root=SHAPES,
    blocks=st.lists(SHAPES, max_size=2),
    data=st.data(),
)
def test_each_rank_names_the_elements_that_it_holds_and_no_others(how, world_size, root, blocks, data):
    reported = 0
    for rank in range(world_size):
        model = Node(root, blocks=nn.ModuleList(Node(shapes) for shapes in blocks))
        ids = _number_elements(model)
        everything = sorted(set().union(*ids.values()))
        if rank == 0:
            infinite = set(data.draw(st.lists(st.sampled_from(everything)))) if data else set(everything[::3])
            nan = set(data.draw(st.lists(st.sampled_from(everything)))) if data else set(everything[::2])
            nan -= infinite
        with one_rank_of(world_size, rank):
            model = _shard(model, how)
            held = set()
            for parameter, shard in _shards(list(model.parameters())):
                if not shard.numel() and how != "fsdp2":
                    continue  # FSDP1 has no gradient for a parameter of which the rank holds nothing
                gradient = torch.zeros_like(shard)
                gradient[torch.isin(shard, torch.tensor(sorted(infinite), dtype=torch.float32))] = -torch.inf
                gradient[torch.isin(shard, torch.tensor(sorted(nan), dtype=torch.float32))] = torch.nan
                gradient[shard < FIRST_ID] = torch.nan  # padding is no parameter's
                parameter.grad = torch.zeros_like(parameter)
                (parameter.grad.to_local() if how == "fsdp2" else parameter.grad).copy_(gradient)
                held |= set(shard.flatten().int().tolist())
            found = non_finite_gradients(model)
        expected = {
            NonFiniteGradient(name, len(mine & infinite), len(mine & nan), len(mine))
            for name, mine in ((name, of_name & held) for name, of_name in ids.items())
            if mine & (infinite | nan)
        }
        assert set(found) == expected and len(found) == len(expected)
        reported += sum(gradient.infinite + gradient.nan for gradient in found)
    assert reported == len(infinite | nan), "together the ranks hold each element once"


def test_the_worst_comes_first_and_names_decide_between_equals():
    model = Node([(4,), (4,), (4,), (4,)])
    for name, gradient in {
        "p0": [0.0, torch.nan, 1.0, 2.0],
        "p1": [torch.inf, -torch.inf, torch.nan, 0.0],
        "p2": [torch.inf, 0.0, 0.0, 0.0],
        "p3": [1.0, 65504.0, 3e38, -3e38],
    }.items():
        getattr(model, name).grad = torch.tensor(gradient)
    assert non_finite_gradients(model) == [
        NonFiniteGradient("p1", 2, 1, 4),
        NonFiniteGradient("p0", 0, 1, 4),
        NonFiniteGradient("p2", 1, 0, 4),
    ]


def test_frozen_parameters_and_a_model_without_gradients_are_passed_over():
    model = Node([(2,), (2,)])
    assert non_finite_gradients(model) == []
    model.p0.requires_grad_(False)
    model.p1.grad = torch.tensor([0.0, torch.inf])
    assert non_finite_gradients(model) == [NonFiniteGradient("p1", 1, 0, 2)]


@pytest.mark.parametrize("how", ("plain", "fsdp", "fsdp, original parameters", "fsdp2"))
def test_a_tied_parameter_is_named_once(how):
    model = Node([(4, 2)], blocks=nn.ModuleList(), head=Node([(4, 2)]))
    model.head.p0 = model.p0
    with one_rank_of(1, 0):
        model = model if how == "plain" else _shard(model, how)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, torch.inf)
        assert non_finite_gradients(model) == [NonFiniteGradient("p0", 8, 0, 8)]


@pytest.mark.parametrize("rank", (0, 1))
def test_a_parameter_that_straddles_ranks_is_named_on_both_whatever_else_wraps_the_model(rank):
    model = torch.compile(nn.Sequential(nn.Linear(3, 5), checkpoint_wrapper(nn.Linear(5, 1))), backend="eager")
    assert "_orig_mod.1._checkpoint_wrapped_module.bias" in dict(model.named_parameters())
    with one_rank_of(2, rank):
        sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        (flat,) = sharded.parameters()
        flat.grad = torch.full_like(flat, torch.nan)
        found = {gradient.parameter: gradient.elements for gradient in non_finite_gradients(sharded)}
    assert found == [{"0.weight": 13}, {"0.weight": 2, "0.bias": 5, "1.weight": 5, "1.bias": 1}][rank]


def test_a_gradient_that_is_not_sharded_yet_is_an_error():
    with one_rank_of(2, 0):
        sharded = FullyShardedDataParallel(nn.Linear(3, 5), device_id=torch.device("cpu"))
        with sharded.no_sync():
            sharded(torch.ones(2, 3)).sum().backward()
        (flat,) = sharded.parameters()
        assert isinstance(flat, FlatParameter)
        with pytest.raises(ValueError, match=r"the model has shape \(20,\) and not that of this rank's shard, \(10,\)"):
            non_finite_gradients(sharded)


def test_all_parameters_are_read_at_once(monkeypatch):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    reads = _count_reads(monkeypatch)
    assert len(non_finite_gradients(model)) == 20
    assert reads == ["tolist"]


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls that read a tensor on the host, as they are made."""
    reads = []

    def counted(name, original):
        return lambda *args, **kwargs: reads.append(name) or original(*args, **kwargs)

    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return reads


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_counts_do_not_depend_on_dtype_shape_layout_or_pieces(dtype, monkeypatch):
    monkeypatch.setattr(attribution, "PIECE", 7)
    values = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[1, 2:5], values[5, 9], values[0, 0] = torch.inf, -torch.inf, torch.nan
    for tensor in (values, values.t(), values.view(3, 2, 10), torch.cat([values, values])[:6]):
        assert count_non_finite(tensor).tolist() == [4, 1]
    assert count_non_finite(values[:0]).tolist() == [0, 0]
    assert count_non_finite(values[2, 3]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        ("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.up.weight", "model.layers.0.mlp.up.weight"),
        ("_orig_mod.layers.1._checkpoint_wrapped_module._orig_mod.bias", "layers.1.bias"),
        ("_fsdp_wrapped_module", ""),
        ("base_model.model.q_proj.lora_A.default.weight", "base_model.model.q_proj.lora_A.default.weight"),
        ("my_orig_mod.module.weight", "my_orig_mod.module.weight"),
    ],
)
def test_names_are_those_of_the_model_itself(wrapped, name):
    assert name_in_model(wrapped) == name


def test_the_class_is_that_of_the_model_under_fsdp2():
    model = Node([(2,)])
    with one_rank_of(1, 0):
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert type(model).__name__ == "FSDPNode"
        assert class_in_model(model) == "Node"
    assert class_in_model(nn.Linear(1, 1)) == "Linear"
