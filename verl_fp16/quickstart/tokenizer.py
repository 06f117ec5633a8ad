"""A byte-level tokenizer of the Qwen2 class: one token a byte, three special tokens, no merges.

The class and the special tokens are those of Qwen models, so that transformers, vLLM and verl's Qwen handling (which
needs ``\\n`` to be exactly one token and ``<|im_end|>`` to exist) take it as they take a published checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 256 + 3
# The label that torch's cross-entropy skips by default.
IGNORED_LABEL = -100

# A user message is left open, so that the answer follows the question directly and the generation prompt adds nothing.
# Closed messages end in a newline because verl's Qwen token builder inserts one after <|im_end|> between turns.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|im_start|>' + message['content'] + '<|im_end|>\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|im_start|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|im_end|>\\n' }}"
    "{% else %}{{ raise_exception('unsupported role: ' + message['role']) }}{% endif %}"
    "{% endfor %}"
)


def byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for each byte, indexed by the byte's value.

    Printable Latin-1 characters stand for themselves; the others are shifted above U+0100 in order of their value
    (the table of GPT-2, which the ByteLevel pre-tokenizer has built in).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    shifted = 0
    symbols = []
    for value in range(256):
        if value in printable:
            symbols.append(chr(value))
        else:
            symbols.append(chr(256 + shifted))
            shifted += 1
    return symbols


def build_tokenizer(path: str | Path) -> Qwen2Tokenizer:
    """Build the tokenizer, save it into ``path`` and return it.

    Token ids 0-255 are the byte values; 256, 257 and 258 are ``<|im_start|>``, ``<|im_end|>`` (end of sequence) and
    ``<|endoftext|>`` (padding). The chat template renders the messages ``[{"role": "user", "content": "12+7="}]`` as
    ``<|im_start|>12+7=``, with or without a generation prompt.

    Like every Qwen tokenizer it normalizes text to Unicode NFC, so decomposed characters come back composed.

    Args:
        path: Folder for the tokenizer files; created if missing.

    Raises:
        RuntimeError: If the installed transformers gives other ids than the ones above, on which the embedding of the
            model and verl's handling of turns rely.
    """
    vocabulary = {symbol: value for value, symbol in enumerate(byte_symbols())}
    for token in (IM_START, IM_END, END_OF_TEXT):
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=END_OF_TEXT,
        bos_token=None,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        # Decoding must return the bytes that were generated, not a tidied version of them.
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    if len(tokenizer) != VOCABULARY_SIZE or tokenizer.encode(f"\n{IM_START}{IM_END}{END_OF_TEXT}") != [
        10,
        256,
        257,
        258,
    ]:
        raise RuntimeError(
            "the installed transformers does not build the byte-level Qwen2 tokenizer as expected: "
            f"{len(tokenizer)} tokens instead of {VOCABULARY_SIZE}, or other ids; transformers 5 is known to work"
        )
    tokenizer.save_pretrained(str(path))
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, rendered as one user message with a generation prompt, without padding."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], answers: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Inputs and next-token labels of answered prompts, for training on the answers alone.

    Padding is on the right, after the labelled tokens, so causal attention by itself keeps it out of the loss.

    Args:
        tokenizer: Its end-of-sequence token closes each answer.
        prompts: Token ids from `prompt_ids`.
        answers: One text for each prompt.

    Returns:
        Two int64 tensors of shape (rows, length): the token ids without the last end token, and the labels, which are
        ``IGNORED_LABEL`` everywhere but on the answer and its end token.

    Raises:
        ValueError: If ``prompts`` and ``answers`` differ in length.
    """
    targets = [
        [*ids, tokenizer.eos_token_id] for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    ]
    length = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)) - 1
    inputs = torch.full((len(prompts), length), tokenizer.pad_token_id)
    labels = torch.full((len(prompts), length), IGNORED_LABEL)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        ids = [*prompt, *target[:-1]]
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, len(prompt) - 1 : len(ids)] = torch.tensor(target)
    return inputs, labels
