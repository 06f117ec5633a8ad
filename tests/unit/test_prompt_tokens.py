"""Tokens of prompts, as verl's rollout has them."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from verl_fp16.prompt_tokens import tokens_of
from verl_fp16.quickstart.tokenizer import build_tokenizer
from verl_fp16.rows import Prompt, RowsError

CHAT = [{"role": "user", "content": "12+7="}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    # The quickstart's own is the same with and without a prompt to answer.
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if message['role'] == 'critic' %}{{ raise_exception('no role of this name') }}{% endif %}"
        "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    return tokenizer


def test_messages_end_with_what_makes_the_model_answer(tokenizer, tmp_path):
    assert tokenizer.decode(tokens_of(Prompt(0, CHAT), tmp_path, tokenizer)) == "12+7=A:"
    assert tokenizer.decode(tokens_of(Prompt(0, "12+7="), tmp_path, tokenizer)) == "12+7="


def test_what_cannot_be_tokens_is_named_with_its_row(tokenizer, tmp_path):
    with pytest.raises(RowsError, match="row 3 has no token. Mend it"):
        tokens_of(Prompt(3, ""), tmp_path, tokenizer)
    with pytest.raises(RowsError, match="row 4 cannot be tokenized .*no role of this name"):
        tokens_of(Prompt(4, [{"role": "critic", "content": "12+7="}]), tmp_path, tokenizer)
