"""What preflight measures of a model, against verl's FSDP engine under the flag on the same tokens."""

from __future__ import annotations

import pytest
import torch
from engines import STRATEGIES, make_engine, run_calls
from ranks import on_ranks

SCALE = 2.0**10
SEQUENCES = [list(range(start, start + 24)) for start in (7, 60, 150, 201)]  # of one length: the engine pads
ROUNDING = 2.0**-9  # a few units in the last place of float16: another order of sums


def measured_by_the_engine(model: str, strategy: str, advantages: list[float]) -> dict[str, dict[str, float]]:
    """By module, the largest output and the largest gradient of it, at the loss scale."""
    from verl_fp16 import standalone
    from verl_fp16.module_names import name_in_model

    engine = make_engine(model, strategy, scale={"init": SCALE})
    found: dict[str, dict[str, float]] = {"outputs": {}, "gradients": {}}

    def note(kind: str, name: str, tensor: torch.Tensor) -> None:
        found[kind][name] = max(found[kind].get(name, 0.0), tensor.detach().abs().max().item())

    def look(name: str, output) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                note("outputs", name, tensor)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: note("gradients", name, gradient))

    for name, module in engine.module.named_modules():
        shown = name_in_model(name)
        module.register_forward_hook(lambda module, args, output, name=shown: look(name, output))

    def policy_loss(model_output, data, dp_group=None):
        total = 0.0
        for row, advantage in zip(model_output["log_probs"].unbind(), advantages, strict=True):
            total = total - (advantage * row[:-1]).sum()
        return total / sum(len(sequence) - 1 for sequence in SEQUENCES), {}

    standalone.train_step(engine, standalone.make_batch(SEQUENCES), loss=policy_loss)
    return found


def measured_by_preflight(model: str, advantages: list[float]):
    from pathlib import Path

    from verl_fp16.preflight.activations import Watch
    from verl_fp16.preflight.passes import MicroBatch, measure
    from verl_fp16.preflight.shards import open_model
    from verl_fp16.preflight.stored_weights import StoredWeights
    from verl_fp16.preflight.streamed_model import StreamedModel, build

    module = build(Path(model))
    watch = Watch(module)
    weights = StoredWeights(module, open_model(Path(model)).weights)
    streamed = StreamedModel(module, weights, torch.device("cpu"), watch.weight_gradient)
    batch = MicroBatch(tuple(map(tuple, SEQUENCES)), tuple(advantages))
    return measure(streamed, watch, [batch], start=int(SCALE).bit_length() - 1)


@pytest.mark.parametrize("kind", ("tiny_model", "tiny_moe_model"))
def test_largest_activations_and_gradients_are_the_engines(kind, request, tmp_path):
    model, advantages = str(request.getfixturevalue(kind)), [1.0, -1.0, -1.0, 1.0]
    strategies = STRATEGIES if kind == "tiny_model" else ("fsdp2",)
    calls = {strategy: ("measured_by_the_engine", model, strategy, advantages) for strategy in strategies}
    (by_engines,) = on_ranks(1, run_calls, "test_preflight_engine", calls, folder=tmp_path)
    ours = measured_by_preflight(model, advantages)
    gradients = ours.gradients[int(SCALE).bit_length() - 1]
    for strategy, engines in by_engines.items():
        for name, largest in engines["outputs"].items():
            if name:
                assert ours.outputs[name].largest == pytest.approx(largest, rel=ROUNDING), (strategy, name)
        for name, largest in engines["gradients"].items():
            if name:
                assert gradients.outputs[name].largest == pytest.approx(largest, rel=8 * ROUNDING), (strategy, name)
        assert len(engines["outputs"]) > 30 and len(engines["gradients"]) > 25
