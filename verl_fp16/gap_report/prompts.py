"""Prompts as token ids, on disk, so that every stage has the same ones."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from verl_fp16.gap_report.errors import GapError
from verl_fp16.gap_report.folder import damaged
from verl_fp16.prompt_tokens import tokens_of
from verl_fp16.rows import Prompt, read_prompts
from verl_fp16.whole_files import taking_its_place

_BATCH = 256


def write_tokens(file: Path, limit: int | None, tokenizer: Any, longest: int | None, target: Path) -> int:
    """Write the tokens of each prompt, with what makes the model answer, a row each.

    Args:
        limit: only so many prompts, the first ones.
        longest: tokens that a prompt may have, so that the answer has room; None where the model says no length.

    Returns:
        how many there are.

    Raises:
        GapError: a prompt is too long, or nothing can be written.
        RowsError: the file cannot be used, or the tokenizer cannot take a prompt of it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("tokens", pa.list_(pa.int32()))])
    rows = (_tokens(file, prompt, tokenizer, longest) for prompt in read_prompts(file, limit))
    number = 0
    try:
        with taking_its_place(target) as fresh, pq.ParquetWriter(fresh, schema) as writer:
            while batch := list(islice(rows, _BATCH)):
                writer.write_table(pa.table({"tokens": batch}, schema=schema))
                number += len(batch)
    except OSError as error:
        raise GapError(f"{target}: it cannot be written ({error.strerror or error})") from None
    return number


def count_and_longest(file: Path) -> tuple[int, int]:
    """How many prompts there are, and the most tokens of one.

    Raises:
        GapError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    number = longest = 0
    try:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_BATCH):
                lengths = pc.list_value_length(batch.column("tokens"))
                number, longest = number + len(lengths), max(longest, pc.max(lengths).as_py())
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, error) from None
    return number, longest


def _tokens(file: Path, prompt: Prompt, tokenizer: Any, longest: int | None) -> list[int]:
    ids = tokens_of(prompt, file, tokenizer)
    if longest is not None and len(ids) > longest:
        raise GapError(
            f"{file}, row {prompt.row}: the prompt has {len(ids):,} tokens, and beside its answer the model has room "
            f"for {longest:,}. Set a shorter --max-tokens, or leave the prompt out"
        )
    return ids
