"""The device memory of an update: FP16 with the loss scaler against verl's own BF16."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from gpu_ranks import needs, on_devices

SEQUENCE, ROWS, MICRO_BATCH = 96, 16, 4
# torch's allocator gives whole blocks of 512 bytes.
BLOCK = 512
# The scaler's own tensors beside the outputs it keeps: the fault on two counts, its halves' factors, one each for the
# loss that is multiplied and for a flag of another device; the rest is room for what the allocator splits otherwise.
SMALL_TENSORS = 64


def _allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def _peak_of(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def peaks_of_updates(
    model: str,
    allocated: Callable[[], int] = _allocated,
    peak_of: Callable[[Callable[[], object]], int] = _peak_of,
) -> dict:
    """Most bytes that a third update needs, above what there was before the engine was built; each engine alone.

    Two rounds, of which the second counts: the first allocates what libraries keep for themselves.
    """
    from verl_fp16 import standalone

    rows = [list(range(start, start + SEQUENCE)) for start in range(ROWS)]
    found: dict = {"outputs": 0}
    for _ in range(2):
        for name, precision in (("bfloat16", None), ("float16", standalone.mixed_precision("float16"))):
            torch.manual_seed(0)
            before = allocated()
            engine = standalone.build_engine(model, precision=precision)
            for _ in range(2):
                _update(engine, rows)
            if name == "float16":
                found["outputs"] = _bytes_of_outputs(engine, rows)
                found["skipped"] = engine.scaler.total.skipped
            found[name] = peak_of(lambda engine=engine: _update(engine, rows)) - before
            del engine
            gc.collect()
            torch.cuda.empty_cache()
            found["left"] = allocated() - before
    return found


def _update(engine, rows) -> None:
    from verl_fp16 import standalone

    standalone.train_step(engine, standalone.make_batch(rows, micro_batch_size=MICRO_BATCH))


def _bytes_of_outputs(engine, rows) -> int:
    """What the scaler keeps of one update's forward passes until it has judged them."""
    note, kept = engine.scaler.note_forward, []

    def noted(loss, outputs=()):
        outputs = list(outputs)
        kept.extend(-(-output.nbytes // BLOCK) * BLOCK for output in outputs)
        note(loss, outputs)

    engine.scaler.note_forward = noted
    _update(engine, rows)
    engine.scaler.note_forward = note
    assert len(kept) == ROWS // MICRO_BATCH, "the log-probabilities of each micro-batch"
    return sum(kept)


@needs("verl", "transformers")
def test_fp16_needs_what_bf16_needs_and_the_scalers_own(tiny_model, tmp_path):
    """The tolerance: the outputs that the scaler keeps, to the byte, and 64 blocks for its small tensors."""
    (found,) = on_devices(1, peaks_of_updates, str(tiny_model), folder=tmp_path, device="cuda")
    assert found["left"] < 2**20, "an engine that is gone leaves nothing that the next one would be charged for"
    assert found["skipped"] == 0 and found["outputs"] >= 4 * SEQUENCE * ROWS
    assert found["bfloat16"] > 10 * (found["outputs"] + SMALL_TENSORS * BLOCK), "else nothing would be said"
    assert found["float16"] <= found["bfloat16"] + found["outputs"] + SMALL_TENSORS * BLOCK, found
