"""Fixtures shared by all tiers."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 0.1 M parameters with a byte-level tokenizer, random weights, seed 0."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from verl_fp16.quickstart.tokenizer import VOCABULARY_SIZE, build_tokenizer

    path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = build_tokenizer(path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=False,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's tier is the folder it is in; the tier gpu is skipped without CUDA."""
    tests = Path(__file__).parent
    tiers = [Path(item.path).relative_to(tests).parts[0] for item in items]
    for item, tier in zip(items, tiers, strict=True):
        item.add_marker(getattr(pytest.mark, tier))
        if tier == "gpu" and not _cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@functools.cache
def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
