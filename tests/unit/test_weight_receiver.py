"""What the receiving side sees: where each tensor of the stream ends, in which dtype, and whether it is still there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from verl_fp16.weight_sync import audit
from verl_fp16.weight_sync.digest import as_unsigned, stream_digest
from verl_fp16.weight_sync.receiver import WeightReceiver

ROWS, HIDDEN, EXPERTS = 10, 8, 4


class Rollout(nn.Module):
    """Loads as vLLM's models do: fused, padded, sliced and transposed parameters, some of them in float32."""

    def __init__(self) -> None:
        super().__init__()

        def parameter(*shape, dtype=torch.float16):
            return nn.Parameter(torch.randn(*shape).to(dtype), requires_grad=False)

        self.embed = parameter(16, HIDDEN)
        self.qkv = parameter(12, HIDDEN)
        self.experts = parameter(EXPERTS, HIDDEN, 6)
        self.gate = parameter(EXPERTS, HIDDEN, dtype=torch.float32)
        self.norm = parameter(HIDDEN)
        self.doubled = parameter(HIDDEN)
        self.summed = parameter(1)
        self.register_buffer("bias", torch.randn(EXPERTS))

    def load(self, weights) -> None:
        for name, tensor in weights:
            if name == "embed":
                self.embed.data[:ROWS].copy_(tensor)
                self.embed.data[ROWS:].fill_(0)
            elif name in ("q", "k", "v"):
                self.qkv.data.narrow(0, 4 * "qkv".index(name), 4).copy_(tensor)
            elif name.startswith("expert."):
                self.experts.data[int(name[-1])].copy_(tensor.t().contiguous())
            elif name == "gate":
                self.gate.data.copy_(tensor)
            elif name == "norm":
                self.norm.data.copy_(tensor.to(torch.float16))
            elif name == "doubled":
                self.doubled.data.copy_(tensor * 2)
            elif name == "summed":
                self.summed.data.fill_(tensor.sum().item())
            elif name == "bias":
                self.bias.copy_(tensor)

    def targets(self):
        return [*self.named_parameters(), *self.named_buffers()]


def weights(dtype=torch.float32) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"embed": (ROWS, HIDDEN), "q": (4, HIDDEN), "k": (4, HIDDEN), "v": (4, HIDDEN), "gate": (EXPERTS, HIDDEN)}
    shapes |= {f"expert.{i}": (6, HIDDEN) for i in range(EXPERTS)}
    shapes |= {name: (HIDDEN,) for name in ("norm", "doubled", "summed")} | {"bias": (EXPERTS,), "tied": (HIDDEN,)}
    return [(name, torch.randn(*shape, generator=generator).to(dtype)) for name, shape in shapes.items()]


@pytest.fixture
def model() -> Rollout:
    return Rollout()


def received(model: Rollout, stream: list, buckets: int = 2) -> WeightReceiver:
    receiver = WeightReceiver(model.targets)
    size = -(-len(stream) // buckets)
    for first in range(0, len(stream), size):
        # As from verl's bucket: all tensors in one buffer.
        part = stream[first : first + size]
        buffer = torch.cat([tensor.reshape(-1) for _, tensor in part])
        views = [piece.view(tensor.shape) for piece, (_, tensor) in
                 zip(buffer.split([t.numel() for _, t in part]), part, strict=True)]  # fmt: skip
        bucket = [(name, view) for (name, _), view in zip(part, views, strict=True)]
        receiver.load(bucket, lambda bucket=bucket: model.load(bucket))
        buffer.fill_(7)  # the bucket is used again
    return receiver


def sent(stream: list) -> dict:
    return {"stream": [
        (name, str(t.dtype).removeprefix("torch."), tuple(t.shape), as_unsigned(stream_digest(t))) for name, t in stream
    ]}  # fmt: skip


def faults(model: Rollout, receiver: WeightReceiver, stream: list) -> list[str]:
    receivers = [("worker", receiver.report(torch.float16))]
    senders = [("rank 0", sent(stream)), ("rank 1", sent(stream))]
    return [*audit.stream_faults(senders, receivers), *audit.holding_faults(receivers)]


@pytest.mark.parametrize("buckets", (1, 2, 5))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_a_sync_without_faults_passes(model, dtype, buckets):
    stream = weights(dtype)
    assert faults(model, received(model, stream, buckets), stream) == []


def test_what_must_not_come_in_float16_is_told_with_the_reason(model):
    stream = weights()
    report = received(model, stream).report(torch.float16)
    assert report["wide"] == {
        "gate": "held in float32",
        "bias": "held in float32",
        "doubled": "not merely copied",
        "summed": "not merely copied",
        # Nothing is done with it, but `summed` came by its values in a way that was not seen.
        "tied": "where it went could not be followed",
    }
    narrow = ["embed", "q", "k", "v", *(f"expert.{i}" for i in range(EXPERTS)), "norm"]
    assert sorted(audit.learned([("worker", report)])["narrow"]) == sorted(narrow)
    # The other two are rounded where they end.
    assert audit.learned([("worker", report)])["exempt"] == ["gate", "bias"]


def test_what_nothing_is_done_with_may_come_in_any_dtype(model):
    """As the head of a model that ties it to the embedding."""
    del model.summed
    stream = [(name, tensor) for name, tensor in weights() if name != "summed"]
    report = received(model, stream).report(torch.float16)
    assert not report["not_loaded"]
    assert "tied" in audit.learned([("worker", report)])["narrow"]


def test_a_name_has_to_be_narrow_on_every_worker(model):
    report = received(model, weights()).report(torch.float16)
    other = {**report, "wide": {"q": "held in bfloat16"}}
    assert "q" not in audit.learned([("worker 0", report), ("worker 1", other)])["narrow"]
    assert "gate" not in audit.learned([("worker 1", other), ("worker 0", report)])["narrow"]
    narrow_there = {**report, "exempt": ["bias"]}
    assert audit.learned([("worker 0", report), ("worker 1", narrow_there)])["exempt"] == ["bias"]


def test_what_was_not_loaded_is_told(model):
    stream = [(name, tensor) for name, tensor in weights() if name not in ("norm", "bias")]
    report = received(model, stream).report(torch.float16)
    # Of `summed` it cannot be seen, since a number was filled in.
    assert report["not_loaded"] == ["norm", "summed"]
    assert list(audit.unchecked([("worker", report)])) == [
        "worker has parameters that the sync did not write: norm, summed",
        "worker did nothing with tied (with a tied head, that is as it should be)",
    ]
    assert report["wide"]["tied"] == "where it went could not be followed"


@pytest.mark.parametrize("streamed", (True, False))
def test_a_part_of_a_fused_parameter_that_stays_as_it_was_is_told(model, streamed, monkeypatch):
    """By the loader, which leaves it out, or by the sender."""
    del model.summed
    load = model.load
    monkeypatch.setattr(model, "load", lambda w: load([(n, t) for n, t in w if n not in ("v", "expert.2")]))
    stream = [item for item in weights(torch.float16) if item[0] != "summed" and (streamed or item[0] != "v")]
    report = received(model, stream).report(torch.float16)
    told = list(audit.unchecked([("worker", report)]))
    assert told[0] == "worker holds in part what the sync did not write: qkv (32 elements), experts (48 elements)"
    assert told[1].startswith(f"worker did nothing with expert.2, tied{', v' if streamed else ''} (")
    assert not {"v", "expert.2", "tied"} & set(audit.learned([("worker", report)])["narrow"])


def test_padding_with_zeros_is_nothing_that_the_sync_left_out(model):
    report = received(model, weights(torch.float16)).report(torch.float16)
    assert report["partly_loaded"] == {}
    model.embed.data[ROWS:].fill_(1)
    other = received(model, [item for item in weights(torch.float16) if item[0] != "norm"])
    model.embed.data[ROWS + 1 :].fill_(1)
    assert other.report(torch.float16)["partly_loaded"] == {"embed": 5 * HIDDEN}


def test_of_several_workers_each_is_looked_at(model):
    stream = weights(torch.float16)
    fine = received(model, stream).report(torch.float16)
    broken = {**fine, "mismatches": ["norm (in norm)"]}
    assert list(audit.holding_faults([("worker 0", fine), ("worker 1", broken)])) == [
        "worker 1 does not hold what it got: norm (in norm)"
    ]


def test_another_dtype_alone_is_a_difference():
    stream = [("w", torch.ones(4, dtype=torch.float16))]
    got = {"stream": [(name, "bfloat16", shape, digest) for name, _, shape, digest in sent(stream)["stream"]]}
    (fault,) = audit.stream_faults([("rank 0", sent(stream))], [("worker", got)])
    assert fault.endswith("in another dtype or shape than rank 0 sent: bfloat16[4] instead of float16[4]")


def test_what_arrived_is_digested_before_it_is_loaded(model):
    """A loader may use the bucket's memory for what it makes."""
    stream = weights(torch.float16)
    receiver = WeightReceiver(model.targets)
    bucket = [(name, tensor.clone()) for name, tensor in stream]

    def load() -> None:
        model.load(bucket)
        for _, tensor in bucket:
            tensor.zero_()

    receiver.load(bucket, load)
    assert faults(model, receiver, stream) == []


@pytest.mark.parametrize("name", ("embed", "qkv", "experts", "gate", "norm"))
def test_one_flipped_bit_in_what_is_held_shows(model, name):
    """The stream was right, and no probe could see the last bit of one weight."""
    stream = weights(torch.float16)
    receiver = received(model, stream)
    held = model.get_parameter(name).data
    held.view(torch.int16 if held.dtype == torch.float16 else torch.int32).view(-1)[5] ^= 1
    (fault,) = faults(model, receiver, stream)
    part = {"qkv": "q (in qkv)", "experts": "expert.0 (in experts)"}.get(name, f"{name} (in {name})")
    assert fault == f"worker does not hold what it got: {part}"


def test_two_experts_that_change_places_on_the_way_show_in_the_stream_alone(model):
    """Both go into one fused parameter, whose additive digest stays what it was."""
    stream = weights(torch.float16)
    swapped = dict(stream)
    swapped["expert.1"], swapped["expert.3"] = swapped["expert.3"], swapped["expert.1"]
    receiver = received(model, list(swapped.items()))
    assert faults(model, receiver, list(swapped.items())) == [], "what arrived is held"
    (fault,) = faults(model, received(model, list(swapped.items())), stream)
    assert fault == "worker has other values than rank 0 sent: expert.1, expert.3"


def test_a_permuted_or_padded_parameter_is_not_a_fault(model):
    """Kernels may want another order, or leave what pads alone."""
    stream = weights(torch.float16)
    receiver = received(model, stream)
    model.experts = nn.Parameter(model.experts.data[torch.tensor([2, 0, 1, 3])].transpose(1, 2).contiguous())
    model.embed.data[ROWS:].fill_(3.0)
    assert faults(model, receiver, stream) == []
    model.experts.data[0, 0, 0] += 1
    (fault,) = faults(model, receiver, stream)
    assert "expert.0 (in experts), expert.1 (in experts)" in fault, "which of them cannot be known any more"


def test_missing_surplus_and_reshaped_tensors_are_named(model):
    stream = weights(torch.float16)
    got = [(name, t.view(2, -1) if name == "tied" else t) for name, t in stream if name != "norm"]
    receivers = [("worker", received(model, [*got, ("spare", torch.ones(2).half())]).report(torch.float16))]
    found = list(audit.stream_faults([("rank 0", sent(stream))], receivers))
    assert found == [
        "worker did not get norm, which rank 0 sent",
        "worker got spare, which rank 0 did not send",
        "worker has tied in another dtype or shape than rank 0 sent: float16[2, 4] instead of float16[8]",
    ]


def test_a_rank_that_gathered_something_else_is_named():
    stream = weights(torch.float16)
    other = [(name, tensor + 1 if name == "k" else tensor) for name, tensor in stream]
    senders = [("actor rank 0", sent(stream)), ("actor rank 1", sent(other))]
    assert list(audit.stream_faults(senders, [])) == ["actor rank 1 has other values than actor rank 0 sent: k"]


def test_the_probe_is_judged_on_its_mean():
    trained = [-1.0, -2.0, -3.0]
    assert list(audit.probe_fault(trained, {"replica 0": [-1.01, -2.0, -3.1]}, 0.05)) == []
    (fault,) = audit.probe_fault(trained, {"replica 0": trained, "replica 1": [-1.0, -2.5, -3.0]}, 0.05)
    assert fault.startswith("replica 1 holds the weights and computes with others: over 3 tokens")
    assert "0.167 nats" in fault and "verl_fp16.sync.probe_tolerance allows 0.05" in fault


def test_a_probe_that_is_not_finite_tells_whose_it_is():
    fine, broken = [-1.0, -2.0, -3.0], [-1.0, float("nan"), -3.0]
    (fault,) = audit.probe_fault(fine, {"replica 0": broken, "replica 1": fine}, 0.05)
    assert fault == "replica 0 holds the weights, and its log-probabilities of the probe's tokens are not finite"
    (fault,) = audit.probe_fault(broken, {"replica 0": broken, "replica 1": fine}, 0.05)
    assert fault.startswith("the actor's own log-probabilities of the probe's tokens are not finite")


def test_metrics_are_sums_over_ranks_and_the_largest_magnitude():
    def report(**values) -> dict:
        counts = {"values": 10, "overflow": 0, "flushed": 1, "subnormal": 2, "non_finite": 0, "max_abs": 3.0}
        return {"bytes": 20, "values": {**counts, **values}, "sample": {"changed": 4, "hidden": 1, "hidden_bf16": 3}}

    found = audit.metrics([("rank 0", report()), ("rank 1", report(max_abs=5.0, overflow=2))], seconds=1.5)
    assert found == {
        "sync/bytes": 20.0,
        "sync/seconds": 1.5,
        "sync/overflow_values": 2.0,
        "sync/flushed_values": 2.0,
        "sync/subnormal_values": 4.0,
        "sync/max_abs_weight": 5.0,
        "sync/unchanged_fraction": 0.25,
        "sync/unchanged_fraction_bf16": 0.75,
    }
    still = {"bytes": 0, "values": None, "sample": {"changed": 0, "hidden": 0, "hidden_bf16": 0}}
    assert "sync/unchanged_fraction" not in audit.metrics([("rank 0", still)], 0.1), "nothing changed: no share of it"


def test_overflows_of_what_is_held_in_other_dtypes_do_not_count():
    counts = {"values": 8, "overflow": 2, "non_finite": 0, "max_abs": 1e5}
    larger = {"a": {**counts, "max_abs": 2e5}}
    streamed_as = {"a": ["a"], "b": ["b.0", "b.1"]}
    senders = [
        ("rank 0", {"faults": {"a": counts, "b": counts}, "streamed_as": streamed_as}),
        ("rank 1", {"faults": larger, "streamed_as": streamed_as}),
    ]
    assert audit.cast_faults(senders, exempt={"b.0"}).keys() == {"a", "b"}, "one of its parts counts"
    assert audit.cast_faults(senders, exempt={"b.0", "b.1"}) == {
        "a": {"values": 16, "overflow": 4, "non_finite": 0, "max_abs": 2e5}
    }


def test_many_names_are_cut():
    assert audit.listed(["a", "b"]) == "a, b"
    assert audit.listed(list("abcdefghijk")) == "a, b, c, d, e, f, g, h and 3 more"


class Odd(nn.Module):
    """Loads in ways that no record of copies can follow to the end."""

    def __init__(self, load) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        self._load = load

    def load(self, weights) -> None:
        for _, tensor in weights:
            self._load(self.p.data, tensor)

    def targets(self):
        return [*self.named_parameters()]


@pytest.mark.parametrize(
    "load",
    (
        lambda p, w: p.zero_().add_(w),
        lambda p, w: p.index_put_((torch.arange(4),), w),
        lambda p, w: p.copy_(w).mul_(2),
        lambda p, w: setattr(p, "data", w.clone()),
    ),
)
def test_what_cannot_be_followed_comes_as_it_is_and_is_no_fault(load):
    stream = [("w", torch.randn(4, 6))]
    model = Odd(load)
    receiver = received(model, stream, buckets=1)
    assert faults(model, receiver, stream) == []
    assert receiver.report(torch.float32)["wide"].keys() == {"w"}


def test_a_part_that_is_written_again_is_held_against_the_last():
    def load(p: torch.Tensor, w: torch.Tensor) -> None:
        p.copy_(w)
        p[:, 2:4].copy_(w[:, :2])

    stream = [("w", torch.randn(4, 6))]
    model = Odd(load)
    receiver = received(model, stream, buckets=1)
    assert faults(model, receiver, stream) == []
    model.p.data[1, 2] += 1
    assert faults(model, receiver, stream) == ["worker does not hold what it got: w (in p)"]


def test_columns_side_by_side_do_not_overlap():
    def load(p: torch.Tensor, w: torch.Tensor) -> None:
        p[:, :3].copy_(w[:, :3])
        p[:, 3:].copy_(w[:, 3:])

    stream = [("w", torch.randn(4, 6))]
    model = Odd(load)
    receiver = received(model, stream, buckets=1)
    assert faults(model, receiver, stream) == []
    for column in (0, 5):
        model.p.data[2, column] += 1
        assert faults(model, receiver, stream), column
        model.p.data[2, column] -= 1


def test_a_target_that_is_gone_is_told():
    stream = [("w", torch.randn(4, 6))]
    model = Odd(lambda p, w: p.copy_(w))
    receiver = received(model, stream, buckets=1)
    model.p = None
    report = receiver.report(torch.float32)
    assert list(audit.unchecked([("worker", report)])) == ["worker has no more of what was loaded into p: unchecked"]
