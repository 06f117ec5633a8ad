"""The model that the stages run: a small one that is made here, or the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

_TRAINING_STEPS = 60
_HEAD_DIM = 64  # that every attention kernel takes
_QUESTIONS = 512


def run(spec: dict[str, Any], tell: Callable[[str], object]) -> dict[str, Any]:
    """Facts: ``parameters`` of the small model, and ``longest`` (tokens of the longest prompt of the sums).

    Of the user's model: ``theirs``, a line on it, None without one; ``values`` of its weights and ``heads`` of its
    attention, with one. Or ``failed``, why it cannot be used.

    Args:
        spec: ``output``, where ``model`` and ``data`` are made; ``model``, the user's, or None.
        tell: is told what is under way.
    """
    from verl_fp16.quickstart.base_model import BaseRecipe, train_base_model
    from verl_fp16.quickstart.task import write_parquet

    output = Path(spec["output"])
    write_parquet(output / "data", seed=1, train_rows=_QUESTIONS * spec["gpus"], held_out_pairs=64)
    recipe = BaseRecipe(
        sum_steps=_TRAINING_STEPS,
        give_up_steps=0,
        warmup_steps=_TRAINING_STEPS // 4,
        accuracy_window=(0.0, 1.0),
        head_dim=_HEAD_DIM,
    )
    tell(f"training a small model for {_TRAINING_STEPS} steps")
    made = train_base_model(output / "model", seed=1, recipe=recipe)
    facts: dict[str, Any] = {"parameters": made.parameters}
    model = output / "model" if spec["model"] is None else Path(spec["model"])
    return facts | _of_model(model, output / "data" / "train.parquet", spec["model"] is not None)


def _of_model(path: Path, data: Path, theirs: bool) -> dict[str, Any]:
    from verl_fp16.preflight.refusals import ModelError
    from verl_fp16.preflight.shards import open_model
    from verl_fp16.prompt_tokens import load_config, load_tokenizer, tokens_of
    from verl_fp16.rows import RowsError, read_prompts

    try:
        model = open_model(path)
        config = load_config(model.path).get_text_config()
        tokenizer = load_tokenizer(model.path)
        longest = max(len(tokens_of(prompt, data, tokenizer)) for prompt in read_prompts(data, None))
    except (ModelError, RowsError) as error:
        return {"failed": str(error)}
    if not theirs:
        return {"longest": longest, "theirs": None}
    values = sum(tensor.values for tensor in model.weights)
    told = f"{values / 1e6:,.1f} M parameters, {model.model_type}"
    heads = getattr(config, "num_attention_heads", None)
    return {"longest": longest, "theirs": told, "values": values, "heads": heads}
