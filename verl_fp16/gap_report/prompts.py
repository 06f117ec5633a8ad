"""Prompts as token ids, on disk, so that every stage has the same ones."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

from verl_fp16.gap_report.errors import GapError
from verl_fp16.rows import Prompt, read_prompts

_BATCH = 256


def write_tokens(file: Path, limit: int | None, tokenizer: Any, longest: int | None, target: Path) -> int:
    """Write the tokens of each prompt, with what makes the model answer, a row each.

    Args:
        limit: only so many prompts, the first ones.
        longest: tokens that a prompt may have, so that the answer has room; None where the model says no length.

    Returns:
        how many there are.

    Raises:
        GapError: a prompt is too long or cannot be written in the model's chat template, or nothing can be written.
        RowsError: the file cannot be used.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    fresh = target.with_name(f".{target.name}.tmp")
    schema = pa.schema([("tokens", pa.list_(pa.int32()))])
    rows = (_tokens(file, prompt, tokenizer, longest) for prompt in islice(read_prompts(file), limit))
    number = 0
    try:
        with pq.ParquetWriter(fresh, schema) as writer:
            while batch := list(islice(rows, _BATCH)):
                writer.write_table(pa.table({"tokens": batch}, schema=schema))
                number += len(batch)
        os.replace(fresh, target)
    except OSError as error:
        raise GapError(f"{target}: it cannot be written ({error.strerror or error})") from None
    finally:
        fresh.unlink(missing_ok=True)
    return number


def count(file: Path) -> int:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).metadata.num_rows


def _tokens(file: Path, prompt: Prompt, tokenizer: Any, longest: int | None) -> list[int]:
    if isinstance(prompt.content, str):
        ids = list(tokenizer(prompt.content)["input_ids"])
    else:
        try:
            found = tokenizer.apply_chat_template(
                prompt.content, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # noqa: BLE001  a chat template raises what it likes
            raise GapError(
                f"{file}, row {prompt.row}: the model's chat template does not take it "
                f"({type(error).__name__}: {error}). Give prompts as text, or a model with another template"
            ) from None
        ids = list(found["input_ids"])
    if not ids:
        raise GapError(f"{file}, row {prompt.row}: the prompt has no token")
    if longest is not None and len(ids) > longest:
        raise GapError(
            f"{file}, row {prompt.row}: the prompt has {len(ids):,} tokens, and beside its answer the model has room "
            f"for {longest:,}. Set a shorter --max-tokens, or leave the prompt out"
        )
    return ids


def tokenizer_of(model: Path) -> Any:
    """
    Raises:
        GapError: the model has none that loads.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # noqa: BLE001  transformers raises anything for what it cannot load
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise GapError(f"{model}: its tokenizer does not load ({told}). Save it into the model's folder") from None


def context_of(model: Path) -> int | None:
    """Tokens that the model takes, as its configuration says."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    return getattr(config.get_text_config(), "max_position_embeddings", None)
