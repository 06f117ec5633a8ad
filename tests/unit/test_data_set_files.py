"""Which files are the splits of a data set on disk, and what is read from each."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from data_set_samples import refused, rows_of, save_arrow, save_parquet, touch

from verl_fp16.data_sets.places import find_files
from verl_fp16.data_sets.reading import read_columns


def found(path: Path, *arguments, root: Path | None = None) -> dict[str, list[str]]:
    splits = find_files(path, *arguments).splits
    return {split: [str(file.relative_to(root or path)) for file in files] for split, files in splits.items()}


def test_names_of_files_say_the_split(tmp_path):
    touch(tmp_path, "train.jsonl", "test.jsonl.gz", "README.md", ".hidden.jsonl", "dataset_infos.json", "notes.txt")
    assert found(tmp_path) == {"train": ["train.jsonl"], "test": ["test.jsonl.gz"]}


def test_shards_are_joined_in_their_order_and_have_to_be_complete(tmp_path):
    names = [f"data/train-0000{number}-of-00003.parquet" for number in range(3)]
    touch(tmp_path, *names, "data/test-00000-of-00001-0123456789abcdef.parquet")
    test = ["data/test-00000-of-00001-0123456789abcdef.parquet"]
    assert found(tmp_path) == {"train": names, "test": test}
    (tmp_path / names[1]).unlink()
    refused("train-00001-of-00003.parquet: this part of the data set is missing", find_files, tmp_path)


def test_configurations_are_named_and_chosen(tmp_path):
    touch(tmp_path, *(f"{c}/{s}-00000-of-00001.parquet" for c in ("main", "socratic") for s in ("train", "test")))
    told = refused("several configurations: main, socratic", find_files, tmp_path)
    assert "--config main" in told
    train, test = "main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet"
    assert found(tmp_path, None, ["main"]) == {"train": [train], "test": [test]}
    assert found(tmp_path / "main", root=tmp_path) == {"train": [train], "test": [test]}
    both = found(tmp_path, None, ["socratic", "main", "socratic"])["train"]
    assert both == ["socratic/train-00000-of-00001.parquet", train]
    refused("--config mian: .* no such configuration, but main, socratic", find_files, tmp_path, None, ["mian"])


def test_a_name_with_more_than_the_split_is_a_configuration(tmp_path):
    touch(tmp_path, "train.jsonl", "train_socratic.jsonl", "test.jsonl", "test_socratic.jsonl", "examples.jsonl")
    refused("several configurations: default, socratic", find_files, tmp_path)
    files = find_files(tmp_path, None, ["default"])
    assert [path.name for part in files.splits.values() for path in part] == ["train.jsonl", "test.jsonl"]
    assert files.notes == (f"not taken, since its name says no split: {tmp_path / 'examples.jsonl'}",)


def test_folders_say_the_split_too(tmp_path):
    touch(tmp_path, "train/algebra/1.json", "train/algebra/12.json", "test/algebra/3.json")
    assert found(tmp_path) == {
        "train": ["train/algebra/1.json", "train/algebra/12.json"],
        "test": ["test/algebra/3.json"],
    }
    assert found(tmp_path / "test", root=tmp_path) == {"test": ["test/algebra/3.json"]}
    touch(tmp_path, "train/geometry/1.json")
    refused("several configurations: algebra, geometry", find_files, tmp_path)


def test_the_nearest_name_says_the_split(tmp_path):
    touch(tmp_path, "test-sets/train/a.jsonl", "train-sets/a.test.jsonl")
    assert found(tmp_path, None, ["a"]) == {"train": ["test-sets/train/a.jsonl"]}


def test_names_that_tell_nothing_are_no_configuration(tmp_path):
    touch(tmp_path, "data/train/part-0.jsonl", "data/train/data-1.jsonl", "test.jsonl")
    assert found(tmp_path) == {"train": ["data/train/data-1.jsonl", "data/train/part-0.jsonl"], "test": ["test.jsonl"]}


def test_what_tools_leave_beside_the_data_is_passed_over(tmp_path):
    touch(tmp_path, "gsm8k-train.arrow", "cache-0123.arrow", ".git/train.jsonl", "__MACOSX/train.jsonl", ".train.jsonl")
    assert found(tmp_path) == {"train": ["gsm8k-train.arrow"]}
    assert find_files(tmp_path).notes == ()


def test_validation_is_the_test_split_where_there_is_no_other(tmp_path):
    touch(tmp_path, "train.jsonl", "validation.jsonl")
    assert found(tmp_path) == {"train": ["train.jsonl"], "test": ["validation.jsonl"]}
    assert found(tmp_path / "validation.jsonl", root=tmp_path) == {"test": ["validation.jsonl"]}
    touch(tmp_path, "test.jsonl")
    assert found(tmp_path) == {"train": ["train.jsonl"], "test": ["test.jsonl"]}
    assert find_files(tmp_path).notes == (f"not taken, since there is a test split: {tmp_path / 'validation.jsonl'}",)


def test_where_no_name_says_the_split_it_has_to_be_said(tmp_path):
    folder = tmp_path / "rows"
    touch(folder, "a.jsonl", "b.jsonl")
    refused("a.jsonl, b.jsonl. Say so with --split", find_files, folder)
    refused("its name does not say", find_files, folder / "a.jsonl")
    assert found(folder, "test") == {"test": ["a.jsonl", "b.jsonl"]}
    assert found(folder / "a.jsonl", "train", root=folder) == {"train": ["a.jsonl"]}
    refused("--split val: it has to be train or test", find_files, folder, "val")
    touch(folder, "train.jsonl")
    refused("say already what is what .train.: leave it out", find_files, folder, "train")
    assert found(folder / "train.jsonl", "test", root=folder) == {"test": ["train.jsonl"]}, "a file's name may be wrong"


def test_a_name_with_two_splits_says_none(tmp_path):
    touch(tmp_path, "train_test.jsonl")
    refused("its name does not say", find_files, tmp_path / "train_test.jsonl")


def test_the_same_split_in_two_forms_is_not_read_twice(tmp_path):
    touch(tmp_path, "train.jsonl")
    save_parquet(tmp_path / "train.parquet", rows_of(1))
    refused("train is there as .*JSON.* and Parquet", find_files, tmp_path)


def test_where_nothing_is(tmp_path):
    refused("Nothing is downloaded", find_files, tmp_path / "openai" / "gsm8k")
    refused("there are no data in it", find_files, tmp_path)
    touch(tmp_path, "train.jsonl")
    refused("PATH is a file: leave it out", find_files, tmp_path / "train.jsonl", None, ["main"])


def test_a_folder_that_cannot_be_looked_into_is_not_passed_over(tmp_path, monkeypatch):
    touch(tmp_path, "main/train.jsonl")
    scandir = os.scandir

    def barred(path):
        if Path(path).name == "main":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", barred)
    refused("main: it cannot be read .Permission denied", find_files, tmp_path)


def test_of_the_hub_cache_the_main_revision_is_taken(tmp_path):
    folder = tmp_path / "datasets--openai--gsm8k"
    touch(folder, "snapshots/aaa/main/train.jsonl", "snapshots/bbb/main/train.jsonl", "blobs/123")
    refused("2 revisions", find_files, folder)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("bbb")
    assert found(folder) == {"train": ["snapshots/bbb/main/train.jsonl"]}


def save_to_disk(folder: Path, split: str | None, **more: object) -> None:
    save_arrow(folder / "data-00000-of-00001.arrow", rows_of(1, 2))
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split, **more}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_data_set_is_what_its_state_names(tmp_path):
    for split in ("train", "test"):
        save_to_disk(tmp_path / "both" / split, "train")  # the folder counts: a part of train may be the test split
        save_arrow(tmp_path / "both" / split / "cache-0123.arrow", rows_of(9))
        save_arrow(tmp_path / "both" / split / "tmp.arrow", rows_of(9))
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    name = "data-00000-of-00001.arrow"
    assert found(tmp_path / "both") == {"train": [f"train/{name}"], "test": [f"test/{name}"]}
    save_to_disk(tmp_path / "one", "train[:10%]")
    assert found(tmp_path / "one") == {"train": [name]}
    save_to_disk(tmp_path / "my-test", "train")
    refused("Say so with --split", find_files, tmp_path / "my-test")
    save_to_disk(tmp_path / "none", None)
    assert found(tmp_path / "none", "train") == {"train": [name]}
    save_to_disk(tmp_path / "old", "train", _indices_data_files=[{"filename": "indices.arrow"}])
    refused("a selection of rows", find_files, tmp_path / "old")
    save_to_disk(tmp_path / "odd", "train", _data_files=None)
    refused("does not name the files", find_files, tmp_path / "odd")
    (tmp_path / "odd" / "state.json").write_text("{")
    refused("state.json: this is no JSON", find_files, tmp_path / "odd")


def test_every_form_is_read_alike(tmp_path):
    rows = rows_of(1, 2, 3)
    lines = "".join(json.dumps(row) + "\r\n\n" for row in rows)
    (tmp_path / "lines.json").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    save_parquet(tmp_path / "parquet", rows)
    save_arrow(tmp_path / "stream.arrow", rows)
    save_arrow(tmp_path / "file.arrow", rows, pa.ipc.new_file)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7
    for file in files:
        assert read_columns(file, lambda names: ["answer"]) == {"answer": [row["answer"] for row in rows]}, file
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    assert read_columns(tmp_path / "one.json", lambda names: names) == {name: [text] for name, text in rows[0].items()}


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "a\u2028b"}\n{"question": "c"}', encoding="utf-8")
    assert read_columns(file, lambda names: ["question"]) == {"question": ["a\u2028b", "c"]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"question,answer\n1,2\n", "neither Parquet"),
        (b"\xff\xfe{", "nor UTF-8"),
        (b'{"a": 1}\n{"a": ', "line 2: this is no JSON"),
        (b'{"a": 1}\n5\n', "line 2: this is no JSON object"),
        (b'{"a":\n', "line 1: this is no JSON"),
        (b"[" * 100_000, "this is no JSON"),
        (b"[1]", "row 0 .from 0.: this is no JSON object"),
        (b"[", "this is no JSON"),
        (b"PAR1 and more", "damaged"),
        (b"ARROW1 and more", "damaged"),
        (b"\xff\xff\xff\xff and more", "damaged"),
        (gzip.compress(b'{"a": 1}')[:-9], "damaged"),
        (b"\x1f\x8b\x08 and more", "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, told):
    file = tmp_path / "train.parquet"
    file.write_bytes(content)
    assert str(file) in refused(told, read_columns, file, lambda names: ["a"])


def test_a_parquet_file_cut_short_is_damaged(tmp_path):
    file = save_parquet(tmp_path / "train.parquet", rows_of(*range(50)))
    file.write_bytes(file.read_bytes()[:-10])
    refused("damaged", read_columns, file, lambda names: ["answer"])


def test_a_column_that_is_there_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array(["1"])] * 2, names=["a", "a"])
    with pa.ipc.new_stream(str(tmp_path / "t.arrow"), table.schema) as writer:
        writer.write_table(table)
    refused("2 columns a", read_columns, tmp_path / "t.arrow", lambda names: ["a"])
