"""The log-prob pass and the update in verl's FSDP2 engine, FP16 against BF16, both with the flag; one process."""

from __future__ import annotations

import gc
import importlib.util
import os
from typing import Any

from measure import Memory, Settings, alternated, join_group_of_one, throughput, token_rows

DTYPES = ("bfloat16", "float16")
BASE = "bfloat16"
# An update that is skipped has no optimizer step: at the scale of the start, the first ones may be.
MOST_SKIPS = 24


def _attention(device: str) -> str:
    return "flash_attention_2" if device != "cpu" and importlib.util.find_spec("flash_attn") else "sdpa"


FLASH = "flash-attn's cross entropy"
FUSED = "verl's fused kernels (torch)"
LOOP = "verl's loop over tokens"


def log_prob_way(settings: Settings) -> str:
    """Where log-probs come from.

    Without flash-attn's cross entropy, or with it switched off, verl computes them in a loop over tokens, one
    log_softmax each; what is measured then is the launching of small kernels, in every dtype the same. Its fused
    kernels do without, but not for a model on FSDP2 whose embeddings are not tied: verl (0.9.1) shards the head apart,
    and they multiply with a shard.
    """
    from transformers import AutoConfig
    from verl.utils import torch_functional

    off = os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") == "1"
    if settings.device != "cpu" and torch_functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE and not off:
        return FLASH
    tied = getattr(AutoConfig.from_pretrained(settings.model), "tie_word_embeddings", False)
    return FUSED if tied else LOOP


def _engine(settings: Settings, dtype: str) -> Any:
    import torch

    from verl_fp16 import standalone

    torch.manual_seed(0)
    fused = log_prob_way(settings) == FUSED
    return standalone.build_engine(
        settings.model,
        precision=standalone.mixed_precision(dtype),
        use_remove_padding=True,
        attention=_attention(settings.device),
        optimizer={"lr": 1e-6},
        model={"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}} if fused else None,
    )


def _told(settings: Settings) -> dict[str, Any]:
    return {
        "attention": _attention(settings.device),
        "log_probs": log_prob_way(settings),
        "sequences": settings.sequences,
        "tokens_each": settings.tokens,
        "micro_batch": settings.micro_batch,
    }


def log_prob(settings: Settings) -> dict[str, Any]:
    """Tokens/s of the teacher-forced forward pass, and the most memory of one with the engine that makes it."""
    from verl_fp16 import standalone

    join_group_of_one(settings.device)
    rows = token_rows(settings.sequences, settings.tokens)
    way = {"use_remove_padding": True, "use_fused_kernels": log_prob_way(settings) == FUSED}
    memory, peaks, sides = Memory(settings.device), {}, {}
    for dtype in DTYPES:
        gc.collect()
        before = memory.now()
        engine = _engine(settings, dtype)

        def once(_: int, engine: Any = engine) -> None:
            standalone.teacher_forced_log_probs(engine, rows, settings.micro_batch, **way)

        once(0)
        peaks[dtype] = memory.peak_of(lambda once=once: once(0)) - before
        sides[dtype] = once
    found = throughput(alternated(sides, settings), settings.sequences * settings.tokens, BASE)
    return _with_peaks(found, peaks) | _told(settings)


def update(settings: Settings) -> dict[str, Any]:
    """Tokens/s of forward, backward and optimizer step, and the most memory of one with weights and optimizer."""
    from verl_fp16 import standalone

    join_group_of_one(settings.device)
    rows = token_rows(settings.sequences, settings.tokens)
    way = {"use_remove_padding": True, "use_fused_kernels": log_prob_way(settings) == FUSED}
    memory, peaks, sides, engines = Memory(settings.device), {}, {}, {}
    for dtype in DTYPES:
        gc.collect()
        before = memory.now()
        engine = engines[dtype] = _engine(settings, dtype)

        def once(_: int, engine: Any = engine) -> None:
            batch = standalone.make_batch(rows, micro_batch_size=settings.micro_batch, **way)
            standalone.train_step(engine, batch)

        _until_applied(engine, once)
        peaks[dtype] = memory.peak_of(lambda once=once: once(0)) - before
        sides[dtype] = once
    scaler = engines["float16"].scaler
    skipped = scaler.total.skipped
    seconds = alternated(sides, settings)
    found = throughput(seconds, settings.sequences * settings.tokens, BASE)
    more = {"skipped_while_measured": scaler.total.skipped - skipped, "loss_scale": scaler.scale_value}
    return _with_peaks(found, peaks) | _told(settings) | more


def _until_applied(engine: Any, once: Any) -> None:
    scaler = engine.scaler
    once(0)
    for _ in range(MOST_SKIPS):
        if scaler is None or not scaler.last_step_skipped:
            return
        once(0)
    raise RuntimeError(f"{MOST_SKIPS + 1} updates in a row were skipped: this model's gradients are not finite in FP16")


def _with_peaks(found: dict[str, Any], peaks: dict[str, int]) -> dict[str, Any]:
    for name, peak in peaks.items():
        found["sides"][name]["peak_bytes"] = peak
    return found
