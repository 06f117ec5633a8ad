"""Fixtures shared by all tiers."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """No example has a deadline: how long one takes says how busy the machine is."""
    with contextlib.suppress(ImportError):  # a GPU machine need not have it
        from hypothesis import settings

        settings.register_profile("unhurried", deadline=None)
        settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 0.1 M parameters with a byte-level tokenizer, random weights, seed 0."""
    return _save_tiny(tmp_path_factory.mktemp("tiny-model"), "Qwen3")


@pytest.fixture(scope="session")
def tiny_moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with four experts, of which each token takes two."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return _save_tiny(tmp_path_factory.mktemp("tiny-moe-model"), "Qwen3Moe", **experts)


@pytest.fixture(scope="session")
def sharp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first one with weights of seven times the size: its log-probabilities differ from token to token."""
    return _save_tiny(tmp_path_factory.mktemp("sharp-model"), "Qwen3", initializer_range=0.15)


@pytest.fixture(scope="session")
def sharp_moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts with weights of seven times the size: computing with others shows."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return _save_tiny(tmp_path_factory.mktemp("sharp-moe-model"), "Qwen3Moe", initializer_range=0.15, **experts)


def _save_tiny(path: Path, architecture: str, **more: object) -> Path:
    import torch
    import transformers

    from verl_fp16.quickstart.tokenizer import VOCABULARY_SIZE, build_tokenizer

    tokenizer = build_tokenizer(path)
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
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
        **more,
    )
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(path)
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
