"""Prompts from files: parquet as verl's, JSON lines, text; and what is wrong with them."""

from __future__ import annotations

import json
import re

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from verl_fp16 import prompts
from verl_fp16.prompts import Prompt, PromptsError, read_prompts

MESSAGES = [{"role": "user", "content": "2 + 2?"}]


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_the_three_kinds_of_files(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'prompt': MESSAGES})}\n\n{json.dumps({'prompt': 'hello'})}\n")
    (tmp_path / "a.txt").write_text("first\r\n\n  third \n")
    rows = write_parquet(tmp_path / "a.parquet", prompt=[MESSAGES, MESSAGES], answer=["4", "4"])
    assert read_prompts(tmp_path / "a.jsonl") == [Prompt(1, MESSAGES), Prompt(3, "hello")]
    assert read_prompts(tmp_path / "a.txt") == [Prompt(1, "first"), Prompt(3, "  third ")]
    assert read_prompts(rows) == [Prompt(1, MESSAGES), Prompt(2, MESSAGES)]
    assert read_prompts(write_parquet(tmp_path / "b.parquet", prompt=["x"])) == [Prompt(1, "x")]


def test_no_more_rows_are_read_than_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'prompt': 'one'})}\nthis is no JSON\n")
    assert read_prompts(tmp_path / "a.jsonl", 1) == [Prompt(1, "one")]
    monkeypatch.setattr(prompts, "_ROWS_AT_ONCE", 3)
    many = write_parquet(tmp_path / "a.parquet", prompt=[str(number) for number in range(10)])
    assert read_prompts(many, 7) == [Prompt(number + 1, str(number)) for number in range(7)]


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=1, max_size=8))
def test_what_is_written_comes_back(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    (folder / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    rows = write_parquet(folder / "a.parquet", prompt=texts)
    for file in (folder / "a.jsonl", folder / "a.txt", rows):
        assert [prompt.content for prompt in read_prompts(file)] == texts


@pytest.mark.parametrize(
    ("name", "content", "told"),
    (
        ("a.txt", "", "there is no prompt in it. Name a parquet file"),
        ("a.txt", "\n \n", "there is no prompt in it"),
        ("a.txt", b"\xff\xfe\x00", "it is not UTF-8 text"),
        ("a.jsonl", "", "there is no prompt in it"),
        ("a.jsonl", "{\n", "line 1 is no JSON"),
        ("a.jsonl", "[1]\n", "line 1 is no object"),
        (
            "a.jsonl",
            '{"question": "x", "id": 3}\n',
            "line 1: it has no column 'prompt'; there are question, id. Rename",
        ),
        ("a.jsonl", '{"prompt": 3}\n', "the prompt of row 1 is neither a text nor a list of chat messages"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ""}\n', "the prompt of row 2 is empty"),
        ("a.jsonl", '{"prompt": [{"content": "x"}]}\n', "the prompt of row 1 is neither"),
        ("a.parquet", "no parquet at all", "it cannot be read as parquet"),
        ("a.parquet", "", "it cannot be read as parquet"),
    ),
)
def test_what_cannot_be_used_is_one_line_with_the_file_and_the_row(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PromptsError, match=f"^{re.escape(str(tmp_path / name))}.*{re.escape(told)}") as raised:
        read_prompts(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_parquet_without_the_column_or_rows_or_text(tmp_path):
    with pytest.raises(PromptsError, match="it has no column 'prompt'; there are question, answer. Rename the one"):
        read_prompts(write_parquet(tmp_path / "a.parquet", question=["x"], answer=["y"]))
    with pytest.raises(PromptsError, match="there is no prompt in it"):
        read_prompts(write_parquet(tmp_path / "b.parquet", prompt=pyarrow.array([], pyarrow.string())))
    with pytest.raises(PromptsError, match="the prompt of row 2 is empty"):
        read_prompts(write_parquet(tmp_path / "c.parquet", prompt=["x", None]))


def test_what_is_not_there_or_no_file(tmp_path):
    with pytest.raises(PromptsError, match="there is no such file. Name a parquet file"):
        read_prompts(tmp_path / "gone.parquet")
    with pytest.raises(PromptsError, match="there is no such file"):
        read_prompts(tmp_path / "gone.txt")
    with pytest.raises(PromptsError, match="this is a folder"):
        read_prompts(tmp_path)
