"""The token sequences that a model is run on: from prompts, or generated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_fp16.preflight.refusals import ModelError
from verl_fp16.prompts import Prompt, PromptsError

RANDOM_SEQUENCES, RANDOM_TOKENS = 4, 64
SHORTEST = 2
"""Tokens: the loss is on those that follow another."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

TEXTS = (
    "The lighthouse keeper wrote down the weather every evening: wind from the north-west, a falling glass, and two "
    "fishing boats that had not come back before dark. In the morning both lay in the harbour.",
    "A train leaves at 9:40 and travels 210 km at 84 km/h. A second train leaves the same station at 10:10 and travels "
    "at 105 km/h. At what time does the second train overtake the first one? Think step by step.",
    "Let f(x) = x^3 - 6x^2 + 9x + 1. Find all local extrema of f on the interval [0, 5], and the largest value that f "
    "takes there. Put the final answer into \\boxed{}.",
    "def merge(left, right):\n    result = []\n    while left and right:\n        source = left if left[0] <= right[0] "
    "else right\n        result.append(source.pop(0))\n    return result + left + right\n\n# What is the running time?",
    "Translate into French and into German: 'The meeting was moved to Thursday, because nobody could find the key.'",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55: what is the sum of the even numbers among the first 30 of these?",
)


@dataclass(frozen=True)
class Sequences:
    """What the model is run on.

    Args:
        ids: the token ids of each sequence, at least :data:`SHORTEST`.
        source: where they come from, in words.
        notes: what was cut or left out, in sentences.
    """

    ids: tuple[tuple[int, ...], ...]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))


def tokenizer_of(folder: Path) -> Any | None:
    """The tokenizer of a model's folder; None where there is none.

    Raises:
        ModelError: there is one that cannot be loaded.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001  tokenizers raise anything, an Exception of Rust's included
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({told}). Save or download it again") from None


def context_of(config: Any) -> int | None:
    """The most positions that the model was made for; None where its configuration does not say."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def from_prompts(
    prompts: Sequence[Prompt], file: Path, tokenizer: Any, config: Any, max_tokens: int, cut: bool
) -> Sequences:
    """The tokens of ``prompts``, chat messages through the tokenizer's chat template.

    Args:
        max_tokens: of a sequence.
        cut: whether longer ones lose their ends; otherwise they are an error.

    Raises:
        PromptsError: of a row that is too long or too short, or that the tokenizer cannot take.
    """
    context, vocabulary = context_of(config), config.get_text_config().vocab_size
    ids, shortened = [], 0
    for prompt in prompts:
        tokens = _tokens(prompt, file, tokenizer)
        where, most = f"{file}: row {prompt.row}", min(max_tokens, context or max_tokens)
        if len(tokens) > most and not cut:
            if context is not None and len(tokens) > context:
                limit, way_out = f"the model's context is {context:,}", "Leave it out, or cut it: --cut"
            else:
                limit, way_out = (
                    f"at most {max_tokens:,} are run",
                    f"--max-tokens {len(tokens)} allows it, --cut cuts it",
                )
            raise PromptsError(f"{where} has {len(tokens):,} tokens, and {limit}. {way_out}")
        shortened += len(tokens) > most
        tokens = tokens[:most]
        if len(tokens) < SHORTEST:
            raise PromptsError(f"{where} has {len(tokens)} token, and the loss needs two. Leave it out")
        if max(tokens) >= vocabulary:
            raise PromptsError(
                f"{where} has token {max(tokens)}, and the model's vocabulary is {vocabulary:,}: this is another "
                "model's tokenizer"
            )
        ids.append(tuple(tokens))
    notes = (f"{shortened} of {len(ids)} prompts were cut to {min(max_tokens, context or max_tokens)} tokens",)
    return Sequences(tuple(ids), f"the first {len(ids)} prompts of {file}", notes if shortened else ())


def _tokens(prompt: Prompt, file: Path, tokenizer: Any) -> list[int]:
    where = f"{file}: row {prompt.row}"
    if not isinstance(prompt.content, str) and not getattr(tokenizer, "chat_template", None):
        raise PromptsError(f"{where} has chat messages, and the model's tokenizer has no chat template. Give texts")
    try:
        return tokenize(tokenizer, prompt.content)
    except Exception as error:  # noqa: BLE001  a chat template may raise anything
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise PromptsError(f"{where} cannot be tokenized ({told}). Mend it, or leave it out") from None


def tokenize(tokenizer: Any, content: str | list[dict[str, Any]]) -> list[int]:
    if isinstance(content, str):
        return list(tokenizer(content)["input_ids"])
    text = tokenizer.apply_chat_template(content, add_generation_prompt=True, tokenize=False)
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def generated(tokenizer: Any | None, config: Any, max_tokens: int, seed: int) -> Sequences:
    """Random tokens of the vocabulary without its special ones, and, with a tokenizer, :data:`TEXTS`.

    Longer ones are cut to ``max_tokens`` and the model's context.
    """
    most = max(SHORTEST, min(max_tokens, context_of(config) or max_tokens))
    vocabulary = config.get_text_config().vocab_size
    special: set[int] = set()
    if tokenizer is not None:
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        vocabulary = min(vocabulary, len(tokenizer))
    ordinary = [token for token in range(vocabulary) if token not in special] or list(range(vocabulary))
    drawn = random.Random(seed)
    length = min(RANDOM_TOKENS, most)
    ids = [tuple(drawn.choices(ordinary, k=length)) for _ in range(RANDOM_SEQUENCES)]
    source = f"generated: {RANDOM_SEQUENCES} sequences of {length} random tokens (seed {seed})"
    if tokenizer is None:
        return Sequences(tuple(ids), source, ("the model has no tokenizer: no text was run, random tokens alone",))
    template = bool(getattr(tokenizer, "chat_template", None))
    texts = [tokenize(tokenizer, [{"role": "user", "content": text}] if template else text)[:most] for text in TEXTS]
    texts = [tuple(text) for text in texts if len(text) >= SHORTEST and max(text) < config.get_text_config().vocab_size]
    through = " through the chat template" if template else ""
    return Sequences((*ids, *texts), f"{source} and {len(texts)} built-in texts{through}")
