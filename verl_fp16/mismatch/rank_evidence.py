"""What the trainer's process asks of an FSDP rank for evidence of the gap; called through Ray, with one of verl's
actors."""

from __future__ import annotations

from typing import Any

from verl_fp16.mismatch.evidence import Evidence
from verl_fp16.readback.rank import engines_of


def first_mini_batch_evidence(worker: Any, max_tokens: int, max_sequences: int) -> tuple[Evidence, dict] | None:
    """This rank's evidence of the newest training step's first mini-batch, and the curves over all ranks.

    None where this rank measures none: another role, or not in bypass mode.
    """
    for _, engine in engines_of(worker):
        first = getattr(engine, "_verl_fp16_first_mini_batch", None)
        # Of ranks that share their sequences (Ulysses), one speaks.
        if first is not None and first.measured and engine.is_mp_src_rank_with_outputs():
            return first.evidence(max_tokens, max_sequences)
    return None
