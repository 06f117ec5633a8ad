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


def swapped_on_the_way() -> None:
    """Two tensors of one shape that go into one fused parameter, after the sender has seen them."""
    original = sender.WeightSender.watch

    def watch(self, weights):
        for name, tensor in original(self, weights):
            if "layers.0.mlp" in name:
                name = name.replace("gate_proj", "x_proj").replace("up_proj", "gate_proj").replace("x_proj", "up_proj")
            yield name, tensor

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
