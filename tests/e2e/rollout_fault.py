"""Plants a fault in the rollout: from the training step ``ROLLOUT_FAULT_FROM`` on, one layer's weights rounded to BF16.

verl imports this in every process of a run, through ``VERL_USE_EXTERNAL_MODULES``. The actor keeps its weights;
what is sent from then on is not what the sender has counted, as by a fault on the way, which an audited sync would see.
"""

from __future__ import annotations

import os

import torch

from verl_fp16.weight_sync import sender

LAYER = "layers.1."

_syncs = 0
_watch = sender.WeightSender.watch


def watch(self, weights):
    global _syncs
    _syncs += 1  # the first is for step 1
    faulty = _syncs >= int(os.environ["ROLLOUT_FAULT_FROM"])
    for name, tensor in _watch(self, weights):
        yield name, tensor.to(torch.bfloat16).to(tensor.dtype) if faulty and LAYER in name else tensor


sender.WeightSender.watch = watch
