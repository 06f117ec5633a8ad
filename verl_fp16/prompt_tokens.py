"""A model's tokenizer, configuration and context, and the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_fp16.preflight.refusals import CONFIG, ModelError
from verl_fp16.rows import Prompt, RowsError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_TOLD = 200  # characters of another library's message


def has_tokenizer(folder: Path) -> bool:
    """Whether there is something of a tokenizer in a model's folder."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        ModelError: there is none that loads.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001  tokenizers raise anything, an Exception of Rust's included
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded ({_told(error)}). Save or download it into the model's folder"
        ) from None


def load_config(folder: Path) -> Any:
    """The configuration of a model's folder.

    Raises:
        ModelError: there is none that transformers reads.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001  whatever a configuration does not fit, transformers has no class for it
        raise ModelError(
            f"{folder / CONFIG}: transformers cannot read it ({_told(error)}). Save or download it again, or install a "
            "transformers that knows the model"
        ) from None


def context_of(config: Any) -> int | None:
    """The most positions that the model was made for; None where its configuration does not say."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def tokens_of(prompt: Prompt, file: Path, tokenizer: Any) -> list[int]:
    """The ids of ``prompt``, of messages with what makes the model answer.

    Args:
        file: where the prompt is from, for messages.

    Raises:
        RowsError: the tokenizer cannot take it, or makes nothing of it.
    """
    where = f"{file}, row {prompt.row}"
    if not isinstance(prompt.content, str) and not getattr(tokenizer, "chat_template", None):
        raise RowsError(f"{where} has chat messages, and the model's tokenizer has no chat template. Give texts")
    try:
        ids = tokenize(tokenizer, prompt.content)
    except Exception as error:  # noqa: BLE001  a chat template may raise anything
        raise RowsError(f"{where} cannot be tokenized ({_told(error)}). Mend it, or leave it out") from None
    if not ids:
        raise RowsError(f"{where} has no token. Mend it, or leave it out")
    return ids


def tokenize(tokenizer: Any, content: str | Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of a text, or of chat messages with what makes the model answer, as verl's rollout has them."""
    if isinstance(content, str):
        return list(tokenizer(content)["input_ids"])
    ids = tokenizer.apply_chat_template(list(content), add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(ids["input_ids"])


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:_TOLD]
