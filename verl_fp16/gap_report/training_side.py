"""Log-probabilities by verl's FSDP engine, as the actor's log-prob pass computes them, in this process alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from verl_fp16.gap_report.errors import GapError

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of its answer."""


class TrainingSide:
    """An actor's engine (FP32 master weights) under the flag's precision, in a process group of one.

    Args:
        model: folder of a Hugging Face model with its tokenizer.
        dtype: float16, bfloat16 or float32.
        fp32_head: whether logits are computed in FP32; see :class:`verl_fp16.gap_report.sides.Training`.
        temperature: that logits are divided by.
        strategy: fsdp or fsdp2.
        attention: the model's attn_implementation; verl's choice without it, on a CPU sdpa.
        remove_padding: verl's ``use_remove_padding``: whether the sequences of a forward are packed.
        tokens_at_once: of a forward; a longer sequence is alone.

    Raises:
        GapError: verl does not build the engine.
    """

    def __init__(
        self,
        model: Path,
        dtype: str,
        fp32_head: bool = False,
        temperature: float = 1.0,
        *,
        strategy: str = "fsdp2",
        attention: str | None = None,
        remove_padding: bool = True,
        tokens_at_once: int = 16384,
    ) -> None:
        self._temperature, self._tokens_at_once, self._remove_padding = temperature, tokens_at_once, remove_padding
        self._seen: set[str] = set()
        try:
            self._engine = _engine(model, dtype, strategy, attention, remove_padding)
        except Exception as error:  # noqa: BLE001  verl, transformers and torch raise anything for a model
            told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise GapError(f"verl's {strategy} engine does not run {model} in {dtype}: {told}") from error
        head = self._engine.module.get_output_embeddings()
        head.register_forward_pre_hook(lambda head, _: self._seen.add(str(head.weight.dtype).removeprefix("torch.")))
        if fp32_head:
            _compute_in_float32(head)

    def __enter__(self) -> TrainingSide:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()

    def found(self) -> dict[str, Any]:
        """What the live objects say: autocast's dtype, and that of the weights that a forward computed with so far."""
        autocast = str(self._engine._autocast_dtype).removeprefix("torch.")
        return {"autocast": autocast, "weights": sorted(self._seen)}

    def log_probs(self, rows: Sequence[Row]) -> Iterator[list[Any]]:
        """Of the tokens of each answer, nats, one float32 array of shape (tokens of the answer,) a row.

        They come forward by forward, in the order of the rows.
        """
        from verl_fp16.standalone import teacher_forced_log_probs

        for batch in forwards(rows, self._tokens_at_once):
            scores = teacher_forced_log_probs(
                self._engine,
                [[*prompt, *answer] for prompt, answer in batch],
                len(batch),
                use_remove_padding=self._remove_padding,
                temperature=self._temperature,
            )
            # The first score is that of the second token.
            yield [score[len(prompt) - 1 :].numpy() for score, (prompt, _) in zip(scores, batch, strict=True)]


def forwards(rows: Sequence[Row], most: int) -> Iterator[list[Row]]:
    """Neighbours whose tokens are at most ``most`` together; a longer one alone."""
    batch: list[Row] = []
    tokens = 0
    for row in rows:
        length = len(row[0]) + len(row[1])
        if batch and tokens + length > most:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += length
    if batch:
        yield batch


def _engine(model: Path, dtype: str, strategy: str, attention: str | None, remove_padding: bool) -> Any:
    import torch

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["VERL_PLATFORM"] = "cpu"
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    import torch.distributed as dist
    import verl  # noqa: F401  its plugins are loaded

    from verl_fp16 import standalone

    store = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "cpu:gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    return standalone.build_engine(
        str(model),
        precision=standalone.mixed_precision(dtype),
        strategy=strategy,
        use_remove_padding=remove_padding,
        attention=attention or ("flash_attention_2" if cuda else "sdpa"),
    )


def _compute_in_float32(head: Any) -> None:
    """Logits as FP32 sums of FP32 products of the last hidden states and the weights that FSDP has cast."""
    import torch
    from torch.nn import functional

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return functional.linear(hidden.float(), head.weight.float(), bias)

    head.forward = forward
