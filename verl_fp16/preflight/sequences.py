"""The token sequences that a model is run on: from prompts, or generated."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_fp16.prompt_tokens import context_of, tokenize, tokens_of
from verl_fp16.rows import Prompt, RowsError

RANDOM_SEQUENCES, RANDOM_TOKENS = 4, 64
SHORTEST = 2
"""Tokens: the loss is on those that follow another."""

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


def from_prompts(
    prompts: Iterable[Prompt], file: Path, tokenizer: Any, config: Any, max_tokens: int, cut: bool
) -> Sequences:
    """The tokens of ``prompts``, chat messages through the tokenizer's chat template.

    Args:
        max_tokens: of a sequence.
        cut: whether longer ones lose their ends; otherwise they are an error.

    Raises:
        RowsError: of a row that is too long or too short, or that the tokenizer cannot take.
    """
    context, vocabulary = context_of(config), config.get_text_config().vocab_size
    ids, shortened = [], 0
    for prompt in prompts:
        tokens = tokens_of(prompt, file, tokenizer)
        where, most = f"{file}, row {prompt.row}", min(max_tokens, context or max_tokens)
        if len(tokens) > most and not cut:
            if context is not None and len(tokens) > context:
                limit, way_out = f"the model's context is {context:,}", "Leave it out, or cut it: --cut"
            else:
                limit, way_out = (
                    f"at most {max_tokens:,} are run",
                    f"--max-tokens {len(tokens)} allows it, --cut cuts it",
                )
            raise RowsError(f"{where} has {len(tokens):,} tokens, and {limit}. {way_out}")
        shortened += len(tokens) > most
        tokens = tokens[:most]
        if len(tokens) < SHORTEST:
            raise RowsError(f"{where} has {len(tokens)} token, and the loss needs two. Leave it out")
        if max(tokens) >= vocabulary:
            raise RowsError(
                f"{where} has token {max(tokens)}, and the model's vocabulary is {vocabulary:,}: this is another "
                "model's tokenizer"
            )
        ids.append(tuple(tokens))
    notes = (f"{shortened} of {len(ids)} prompts were cut to {min(max_tokens, context or max_tokens)} tokens",)
    return Sequences(tuple(ids), f"the first {len(ids)} prompts of {file}", notes if shortened else ())


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
