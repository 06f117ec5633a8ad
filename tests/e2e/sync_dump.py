"""Writes what actor ranks and vLLM's workers hold after each audited sync, into the folder ``SYNC_DUMP``.

verl imports this module in every process through ``VERL_USE_EXTERNAL_MODULES``. Files: ``master-<rank>-<n>.pt`` and
``held-<pid>-<n>.pt``, name -> tensor, for the n-th audited sync of the process.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from verl_fp16.weight_sync import rank_calls, receiver

FOLDER = Path(os.environ["SYNC_DUMP"])


def _save(tensors: dict[str, torch.Tensor], kind: str) -> None:
    # By the files that are there: Ray carries a function of this module by value, with globals of its own.
    number = 1 + len(list(FOLDER.glob(f"{kind}-*.pt")))
    torch.save(tensors, FOLDER / f"{kind}-{number}.pt")


def _dump_masters() -> None:
    original = rank_calls.report_sync

    def report_sync(worker):
        report = original(worker)
        if report["stream"]:
            engine = rank_calls._actor_engine(worker)
            state = {
                name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
                for name, tensor in _state_to_send(engine).items()
            }
            _save(state, f"master-{report['rank']}")
        return report

    rank_calls.report_sync = report_sync


def _state_to_send(engine) -> dict[str, torch.Tensor]:
    if not engine.model_config.lora.get("merge", False):
        return engine.module.state_dict()
    from verl.utils.fsdp_utils import merged_lora_context, normalize_peft_param_name

    with merged_lora_context(engine.module, backup_adapters=True):
        state = normalize_peft_param_name(engine.module.state_dict())
        return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in state.items()}


def _dump_held() -> None:
    original = receiver.WeightReceiver.report

    def report(self, dtype):
        said = original(self, dtype)
        held = {name: tensor.detach().clone() for name, tensor in self._targets()}
        _save(held, f"held-{os.getpid()}")
        return said

    receiver.WeightReceiver.report = report


_dump_masters()
_dump_held()
