"""Answers by vLLM in BF16, FP16 and FP32: three engines in turn on one device, CUDA graphs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measure import Settings, alternated, throughput, token_rows

DTYPES = ("bfloat16", "float16", "float32")
BASE = "bfloat16"
# Of the GPU's memory for each of the three.
SHARE = 0.28


def rollout(settings: Settings) -> dict[str, Any]:
    """Answer tokens/s; a dtype that vLLM does not run is told in its place.

    Memory is no figure here: vLLM fills the share that it is given with its KV cache, whatever the dtype.

    Raises:
        SamplingError: vLLM is not installed, or does not even run BF16.
    """
    from verl_fp16.sampling import Request, Sampler, SamplingError

    prompts = token_rows(settings.prompts, settings.prompt_tokens)
    sides, failed = {}, {}
    for dtype in DTYPES:
        try:
            sampler = Sampler(
                Path(settings.model),
                dtype=dtype,
                max_tokens=settings.answer_tokens,
                max_model_len=settings.prompt_tokens + settings.answer_tokens + 1,
                gpu_memory_utilization=SHARE,
            )
        except SamplingError as error:
            if dtype == BASE:
                raise
            failed[dtype] = {"failed": str(error)}
            continue

        def once(number: int, sampler: Any = sampler) -> None:
            # Other first tokens in every round: no prompt is in vLLM's prefix cache.
            rows = (
                Request(index, [5 + number % 200, 5 + index % 200, *prompt[2:]], number, settings.answer_tokens)
                for index, prompt in enumerate(prompts)
            )
            for _ in sampler.sample(rows):
                pass

        once(0)
        sides[dtype] = once
    found = throughput(alternated(sides, settings), settings.prompts * settings.answer_tokens, BASE)
    found["sides"] |= failed
    return found | {
        "prompts": settings.prompts,
        "prompt_tokens": settings.prompt_tokens,
        "answer_tokens": settings.answer_tokens,
        "gpu_memory_utilization": None if settings.device == "cpu" else SHARE,
    }
