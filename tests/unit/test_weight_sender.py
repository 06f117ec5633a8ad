"""What one rank sends: which dtype each name goes in, what is counted, and whose memory it takes."""

from __future__ import annotations

import torch

from verl_fp16.weight_sync.sender import Learned, WeightSender

STATE = {
    "packed": torch.ones(2, 64),
    "plain": torch.full((128,), 0.5),
    "gate": torch.full((4,), 2.0),
}


def stream(sender: WeightSender, state: dict | None = None) -> dict[str, torch.Tensor]:
    """As verl does it: what is packed goes apart."""

    def apart():
        for name, tensor in sender.images(state or STATE, "cpu").items():
            if name == "packed":
                yield from ((f"packed.{index}", part) for index, part in enumerate(tensor))
            else:
                yield name, tensor

    sender.begin()
    return {name: tensor.clone() for name, tensor in sender.watch(apart())}


def learned_sender(narrow: set[str], exempt: set[str] = frozenset(), policy: str = "error") -> WeightSender:
    sender = WeightSender(torch.float16, policy)
    sender.prepare(digests=False)
    stream(sender)
    sender.report()
    sender.learn(Learned(frozenset(narrow), frozenset(exempt)))
    sender.prepare(digests=False)
    return sender


def test_a_packed_tensor_goes_narrow_where_all_of_its_parts_may():
    for narrow, dtype in (({"packed.0"}, torch.float32), ({"packed.0", "packed.1"}, torch.float16)):
        sent = stream(learned_sender(narrow))
        assert {name: tensor.dtype for name, tensor in sent.items()} == {
            "packed.0": dtype,
            "packed.1": dtype,
            "plain": torch.float32,
            "gate": torch.float32,
        }


def test_a_packed_tensor_is_exempt_where_all_of_its_parts_are():
    for exempt, values in (({"packed.0"}, 260), ({"packed.0", "packed.1"}, 132)):
        sender = learned_sender({"plain"}, exempt)
        stream(sender)
        assert sender.report()["values"]["values"] == values


def test_what_goes_as_it_is_goes_first():
    sent = stream(learned_sender({"packed.0", "packed.1"}))
    assert list(sent) == ["plain", "gate", "packed.0", "packed.1"]


def test_images_take_their_memory_in_turns():
    sender = learned_sender({"packed.0", "packed.1", "packed", "plain"})
    places = []
    for _ in range(4):
        sender.prepare(digests=False)
        sender.begin()
        for _, tensor in sender.watch(sender.images(STATE, "cpu").items()):
            if tensor.dtype == torch.float16:
                places.append(tensor.data_ptr())
        sender.report()
    assert len(places) == 8 and len(set(places)) <= 3


def test_two_streams_are_one_report_and_the_next_begins_anew():
    sender = learned_sender({"plain"})
    stream(sender), stream(sender)
    assert sender.report()["values"]["values"] == 2 * 260
    assert sender.report()["values"] is None
    stream(sender)
    sender.prepare(digests=False)
    assert sender.report()["values"] is None


def test_infinite_values_stay_what_they_are_under_clamp():
    sender = WeightSender(torch.float16, "clamp")
    sender.prepare(digests=False)
    sent = stream(sender, {"mask": torch.tensor([0.0, -torch.inf, 1e5, -1e5])})
    assert sent["mask"].tolist() == [0.0, -torch.inf, 65504.0, -65504.0]
    assert sender.report()["faults"]["mask"]["non_finite"] == 1
