"""Prompts from every format that is read, and what is none."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_fp16.rows import Prompt, RowsError, is_messages, read_prompts, read_rows

CHAT = [{"role": "user", "content": "1+1="}]


def test_prompts_are_read_from_every_format(tmp_path):
    table = tmp_path / "table.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": CHAT, "index": 1}] * 300), table)
    assert list(read_prompts(table)) == [Prompt(row, CHAT) for row in range(300)]
    renamed = tmp_path / "renamed.txt"
    table.rename(renamed)
    assert len(list(read_prompts(renamed))) == 300
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(("", json.dumps({"prompt": CHAT}), " ", json.dumps({"prompt": "12+7="}))))
    assert list(read_prompts(lines)) == [Prompt(0, CHAT), Prompt(1, "12+7=")]
    text = tmp_path / "prompts"
    text.write_text("one {\n\n  two\n")
    assert list(read_prompts(text)) == [Prompt(0, "one {"), Prompt(1, "  two")]


@pytest.mark.parametrize("prompt", (3, "", [], [{"role": "user"}], [{"content": "x"}], None))
def test_what_is_no_prompt_is_named_with_its_row(prompt, tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"prompt": CHAT}) + "\n" + json.dumps({"prompt": prompt}) + "\n")
    with pytest.raises(RowsError, match="lines.jsonl, row 1: prompt has to be text, or a list of messages"):
        list(read_prompts(file))


def test_what_is_read_is_read_row_by_row(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\nno JSON\n")
    rows = read_rows(file, ("prompt",))
    assert next(rows) == {"prompt": "a"}
    with pytest.raises(RowsError, match="lines.jsonl, line 2: this is no JSON"):
        next(rows)


def test_no_more_rows_are_read_than_asked_for(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\nno JSON\n")
    assert list(read_prompts(file, 1)) == [Prompt(0, "a")]


def test_of_a_table_only_the_prompts_are_read(tmp_path, monkeypatch):
    file = tmp_path / "table.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": CHAT, "image": "large"}]), file)
    read = []
    batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, **k: (read.append(batch) or batch for batch in batches(self, **k))
    )
    assert list(read_prompts(file)) == [Prompt(0, CHAT)]
    assert [batch.schema.names for batch in read] == [["prompt"]]


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=1, max_size=8))
def test_what_is_written_comes_back(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    (folder / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    pq.write_table(pa.table({"prompt": texts}), folder / "a.parquet")
    for name in ("a.jsonl", "a.txt", "a.parquet"):
        assert [prompt.content for prompt in read_prompts(folder / name)] == texts


@pytest.mark.parametrize("name", ("a.txt", "a.jsonl"))
def test_what_is_not_utf8_is_one_line(name, tmp_path):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(RowsError, match=f"{name}: this is no UTF-8 text"):
        list(read_prompts(tmp_path / name))


def test_a_damaged_table_is_one_line(tmp_path):
    file = tmp_path / "table.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": CHAT}] * 3000), file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(RowsError, match="table.parquet: it is damaged, or was not copied whole"):
        list(read_prompts(file))
    file.write_text("")
    with pytest.raises(RowsError, match="the file is empty"):
        list(read_prompts(file))


def test_messages_are_a_list_of_roles_and_contents():
    assert is_messages(CHAT) and not is_messages(CHAT[0]) and not is_messages("1+1=")
