"""Whether a user's model has room on the GPUs, and over how many of them a rollout of it is spread. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
STATE_BYTES, MASTER_BYTES, ROLLOUT_BYTES = 16, 4, 2
"""Of a parameter: FP32 weights and gradients with AdamW's state; the weights alone; those of the rollout."""
_STATE_SHARE, _RUN_SHARE, _GAP_SHARE = 0.7, 0.4, 0.9
"""Of a GPU's memory: for the state in training, for vLLM in the run (as in the recipes), for one side of the gap."""
_WEIGHTS_SHARE = 0.7
"""Of what vLLM has, for its weights; the rest is its KV cache and what a forward needs."""
_FORWARD_BYTES = 6 * GIB
"""Logits of one forward of the gap, in several copies."""


@dataclass(frozen=True)
class Room:
    """What fits.

    Args:
        tensor_parallel: GPUs that hold one rollout's weights in the run.
        run, gap: why the stage cannot be run; "" where it can.
    """

    tensor_parallel: int = 1
    run: str = ""
    gap: str = ""


def room(values: int, heads: int | None, gpus: int, gpu_bytes: int) -> Room:
    """
    Args:
        values: of the model's weights.
        heads: of its attention, which a rollout's GPUs have to divide; None where they are not known.
        gpus: how many there are for it.
        gpu_bytes: memory of the smallest one.
    """
    parallel = _tensor_parallel(values, heads, gpus, gpu_bytes)
    state, masters = values * STATE_BYTES / gpus, values * MASTER_BYTES + _FORWARD_BYTES
    run = gap = ""
    if state > _STATE_SHARE * gpu_bytes:
        run = (
            f"its FP32 master weights, gradients and AdamW's state are {_gib(state)} on each of {gpus} "
            f"{'GPU' if gpus == 1 else 'GPUs'} of {_gib(gpu_bytes)}: give more with --gpus, or a smaller model"
        )
    elif parallel is None:
        run = f"no number of these {gpus} GPUs divides its {heads} heads of attention and holds a rollout of it"
    if masters > _GAP_SHARE * gpu_bytes:
        gap = (
            f"it is measured on one GPU, and one of {_gib(gpu_bytes)} does not hold its FP32 weights with a forward, "
            f"{_gib(masters)}"
        )
    return Room(parallel or 1, run, gap)


def _tensor_parallel(values: int, heads: int | None, gpus: int, gpu_bytes: int) -> int | None:
    """The fewest GPUs that hold the rollout's weights; None where no number does."""
    weights, most = values * ROLLOUT_BYTES, _WEIGHTS_SHARE * _RUN_SHARE * gpu_bytes
    fitting = (number for number in range(1, gpus + 1) if gpus % number == 0 and weights / number <= most)
    return next((number for number in fitting if heads is None or heads % number == 0), None)


def _gib(size: float) -> str:
    return f"{size / GIB:.0f} GiB"
