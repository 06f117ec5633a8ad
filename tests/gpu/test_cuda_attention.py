"""Packed sequences on a GPU, with flash attention and with torch's: as near to FP32 as padded ones are."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gpu_ranks import needs, on_devices

pytestmark = needs("verl", "transformers")

ATTENTIONS = ("sdpa", "flash_attention_2")
LENGTHS = (5, 64, 17, 96, 33, 8, 50, 2)


def sequences() -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(5, 250, (length,), generator=random).tolist() for length in LENGTHS]


def log_probs(model: str, dtype: str, attention: str, packed: bool) -> torch.Tensor:
    """Of every token but the first of each sequence, in nats, float64."""
    from verl_fp16 import standalone

    engine = standalone.build_engine(
        model,
        precision=standalone.mixed_precision(dtype),
        use_remove_padding=packed,
        attention=attention,
    )
    rows = standalone.teacher_forced_log_probs(engine, sequences(), 4, use_remove_padding=packed)
    return torch.cat(rows).double()


def all_ways(model: str, attentions: tuple[str, ...]) -> dict[str, torch.Tensor]:
    found = {"float32": log_probs(model, "float32", "sdpa", False)}
    for attention in attentions:
        for way, packed in (("padded", False), ("packed", True)):
            found[f"float16 {attention} {way}"] = log_probs(model, "float16", attention, packed)
        found[f"bfloat16 {attention}"] = log_probs(model, "bfloat16", attention, True)
    return found


@pytest.fixture(scope="module")
def ways(sharp_model, device, tmp_path_factory) -> dict[str, torch.Tensor]:
    has_flash = device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    arguments = (str(sharp_model), ATTENTIONS if has_flash else ATTENTIONS[:1])
    return on_devices(1, all_ways, *arguments, folder=tmp_path_factory.mktemp("ways"), device=device)[0]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_packed_log_probs_are_the_padded_ones_within_float16(ways, attention):
    """Kernels and the order of sums differ, so errors differ by chance: of the packed way a half more is allowed."""
    if f"float16 {attention} packed" not in ways:
        pytest.skip("flash-attn is not installed here, or this is a rehearsal on a CPU")
    padded, packed = (ways[f"float16 {attention} {way}"] for way in ("padded", "packed"))
    exact, coarse = ways["float32"], ways[f"bfloat16 {attention}"]
    assert packed.isfinite().all() and len(packed) == sum(LENGTHS) - len(LENGTHS)
    error = (packed - exact).abs().mean()
    assert 0 < error < 1.5 * (padded - exact).abs().mean()
    assert error < 0.5 * (coarse - exact).abs().mean(), "BF16 has 3 bits less"
    # A token of another sequence that is attended to would show here, in nats rather than in roundings.
    assert (packed - padded).abs().max() < 20 * (padded - exact).abs().mean()
