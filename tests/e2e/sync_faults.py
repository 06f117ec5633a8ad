"""Plants the fault ``SYNC_FAULT`` in a weight sync; verl imports this through ``VERL_USE_EXTERNAL_MODULES``."""

from __future__ import annotations

import os

import torch

from verl_fp16.weight_sync import receiver, sender


def flipped_bit() -> None:
    """In what vLLM holds, after it was loaded: the last bit of one weight."""
    original = receiver.WeightReceiver.report

    def report(self, dtype):
        held = dict(self._targets())["model.layers.1.mlp.gate_up_proj.weight"]
        held.data.view(torch.int16)[7, 7] ^= 1
        return original(self, dtype)

    receiver.WeightReceiver.report = report


def swapped_experts() -> None:
    """Two experts of a layer, after the sender has seen them; what is held is a sum that does not change."""
    original = sender.WeightSender.watch
    first, second = (f"layers.0.mlp.experts.{expert}." for expert in (1, 3))

    def watch(self, weights):
        for name, tensor in original(self, weights):
            yield name.replace(first, "#").replace(second, first).replace("#", second), tensor

    sender.WeightSender.watch = watch


def stale_packed_weight() -> None:
    """vLLM's CPU kernels may read a copy that is packed after loading: here one of the weights of the start."""
    original = receiver.WeightReceiver.__init__

    def __init__(self, targets):
        from vllm.model_executor.model_loader import utils

        original(self, targets)
        utils.process_weights_after_loading = lambda *args: None
        (worker,) = (cell.cell_contents for cell in targets.__closure__)
        for layer in worker.model_runner.model.modules():
            if hasattr(layer, "cpu_linear"):
                packed = layer.weight.detach().clone()
                layer.cpu_linear = lambda x, weight, bias, packed=packed: torch.nn.functional.linear(x, packed, bias)

    receiver.WeightReceiver.__init__ = __init__


globals()[os.environ["SYNC_FAULT"]]()
