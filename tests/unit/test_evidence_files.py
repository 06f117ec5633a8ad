"""Evidence on disk: what is in it, that it is whole or not there, how much is kept, and odd texts."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evidence_samples import CURVES, FACTS, evidence, token, written

from verl_fp16.mismatch import evidence_files
from verl_fp16.mismatch.evidence import collect
from verl_fp16.mismatch.evidence_files import COLUMNS, step_folders
from verl_fp16.mismatch.evidence_reading import read, read_table
from verl_fp16.mismatch.statistics import GapStatistics

FILES = ["by_length.parquet", "by_position.parquet", "facts.json", "sequences.parquet", "tokens.parquet"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_was_collected_comes_back(tmp_path):
    """From tensors to the rows of the tables."""
    mu = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.25, -9.0]])
    pi = torch.tensor([[-1.0, -math.inf, -3.5], [-0.5, -0.5, -1.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    statistics = GapStatistics()
    rows = statistics.add(mu, pi, mask)
    found = collect(mu, pi, mask, torch.arange(65, 71).view(2, 3), rows, max_tokens=3, max_sequences=5, ids=["a", "b"])
    path = written(tmp_path / "new" / "folder", 123, of=found, curves=statistics.curves())
    assert path == tmp_path / "new" / "folder" / "step_000123"
    assert names(path) == FILES
    first, second, third = pq.read_table(path / "tokens.parquet").to_pylist()
    assert first == {
        **{"step": 123, "rank": 0, "row": 0, "sample_id": "a", "position": 1, "length": 2, "token_id": 66},
        **{"text": "B", "before": "A", "after": "C", "before_ids": [65], "after_ids": [67]},
        **{"log_mu": -2.0, "log_pi": -math.inf, "log_ratio": -math.inf},
    }
    assert (second["text"], second["log_ratio"], second["before"], second["after"]) == ("C", -0.5, "AB", "")
    assert (third["text"], third["log_ratio"], third["sample_id"], third["after_ids"]) == ("E", -0.25, "b", [])
    assert pq.read_table(path / "sequences.parquet").to_pylist() == [
        {"step": 123, "rank": 0, "row": 0, "sample_id": "a", "length": 2, "log_ratio": -0.5},
        {"step": 123, "rank": 0, "row": 1, "sample_id": "b", "length": 2, "log_ratio": -0.25},
    ]
    for kind in ("position", "length"):
        table = pq.read_table(path / f"by_{kind}.parquet").to_pylist()
        assert table == [{"step": 123, **row} for row in statistics.curves()[kind]]
    facts = json.loads((path / "facts.json").read_text())
    assert {name: facts[name] for name in FACTS} == FACTS
    assert (facts["step"], facts["alarm"], facts["tokens_seen"], facts["sequences_seen"]) == (123, False, 4, 2)
    assert facts["sequences_kept"] == "all"


def test_each_column_has_its_unit(tmp_path):
    path = written(tmp_path)
    for name, columns in COLUMNS.items():
        schema = pq.read_schema(path / name)
        assert [(field.name, field.metadata[b"unit"].decode()) for field in schema] == [
            (column, unit) for column, _, unit in columns
        ]


def test_that_sequences_are_a_sample_is_written_beside_them(tmp_path):
    path = written(tmp_path, of=evidence(token(), sequences=3, seen=30))
    kept = "3, evenly spaced rows of the batch"
    assert json.loads((path / "facts.json").read_text())["sequences_kept"] == kept
    assert pq.read_schema(path / "sequences.parquet").metadata[b"sequences_kept"].decode() == kept


def test_nothing_to_tell_is_tables_without_rows(tmp_path):
    path = written(tmp_path, of=evidence(sequences=0), curves={"position": [], "length": []}, facts={})
    for name, columns in COLUMNS.items():
        table = pq.read_table(path / name)
        assert (table.num_rows, table.column_names) == (0, [column for column, _, _ in columns])
    assert read(path).tokens == []


@pytest.mark.parametrize(
    ("value", "told"),
    (
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (torch.tensor(2.5), 2.5),
        (torch.float16, "torch.float16"),
        ((1, {"a": math.inf}), [1, {"a": "inf"}]),
        (Path("/x"), "/x"),
        (None, None),
        (True, True),
        ("é\ud83d", "é\ud83d"),
        ({1: 2}, {"1": 2}),
    ),
)
def test_facts_are_json_whatever_they_are(value, told, tmp_path):
    text = (written(tmp_path, facts={"fact": value, "step": "mine"}) / "facts.json").read_text()
    facts = json.loads(text, parse_constant=pytest.fail)
    assert facts["fact"] == told
    assert facts["step"] == 7, "what the folder says of itself is not the caller's"


@pytest.mark.parametrize(
    ("decoded", "text"),
    (
        ("\x1b[31mred\x07", "\x1b[31mred\x07"),
        ("line\r\nline\t\u2028", "line\r\nline\t\u2028"),
        ("漢字", "漢字"),
        ("\ud83d", "\ufffd"),
        ("a\ude00b", "a\ufffdb"),
        ("\ud83d\ude00", "😀"),
        ("\x00", "\x00"),
        ("", ""),
    ),
)
def test_odd_texts_are_kept(decoded, text, tmp_path):
    path = written(tmp_path, 1, token(sample_id=decoded), decode=lambda ids: decoded)
    (row,) = read_table(path / "tokens.parquet", "tokens.parquet")
    assert (row["text"], row["before"], row["after"], row["sample_id"]) == (text,) * 4


def test_half_of_a_character_is_kept_as_what_the_tokenizer_makes_of_it(tmp_path):
    halves = list("😀".encode())
    path = written(tmp_path, 1, token(before=halves[:1], token_id=halves[1], after=halves[2:]))
    (row,) = read(path).tokens
    assert (row["before"], row["text"]) == ("\ufffd", "\ufffd")
    assert [*row["before_ids"], row["token_id"], *row["after_ids"]] == halves


@pytest.mark.parametrize("error", (IndexError, KeyError, TypeError, ValueError, OverflowError))
def test_an_id_that_the_tokenizer_refuses(error, tmp_path):
    def decode(ids):
        if max(ids) > 255:
            raise error(max(ids))
        return bytes(ids).decode()

    path = written(tmp_path, 1, token(token_id=12345, before=[97, 999, 98], after=[99]), decode=decode)
    (row,) = read(path).tokens
    assert (row["before"], row["text"], row["after"]) == ("a<id 999>b", "<id 12345>", "c")


def test_another_error_of_the_tokenizer_is_the_callers_and_leaves_nothing(tmp_path):
    def decode(ids):
        raise RuntimeError("a fault of the tokenizer")

    with pytest.raises(RuntimeError):
        written(tmp_path, decode=decode)
    assert names(tmp_path) == []


def failing(patch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    """Have the writing of this file, or the renaming that puts the folder in its place, fail."""
    if where == "rename":
        original = Path.rename

        def rename(self, target):
            if self.name.endswith(".tmp") and not (self / "marker").exists() and Path(target).name == "step_000007":
                raise error
            return original(self, target)

        patch.setattr(Path, "rename", rename)
        return
    target, name = (Path, "write_text") if where == "facts.json" else (pq, "write_table")
    original = getattr(target, name)

    def write(first, *arguments, **options):
        path = first if where == "facts.json" else arguments[0]
        if path.name == where:
            path.write_bytes(b"PAR1 half of it")
            raise error
        return original(first, *arguments, **options)

    patch.setattr(target, name, write)


@pytest.mark.parametrize("error", (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()))
@pytest.mark.parametrize("where", (*FILES, "rename"))
@pytest.mark.parametrize("before", (False, True))
def test_a_write_that_fails_leaves_nothing_and_does_not_harm_the_former_folder(where, error, before, tmp_path):
    if before:
        (written(tmp_path) / "marker").write_text("the former one")
    written(tmp_path, 3)
    former = contents(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, where, error)
        with pytest.raises(type(error)):
            written(tmp_path, 7, token(5))
    assert contents(tmp_path) == former
    assert names(tmp_path) == (["step_000003", "step_000007"] if before else ["step_000003"])
    written(tmp_path, 7, token(5))
    assert [row["row"] for row in read(tmp_path / "step_000007").tokens] == [5]


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path):
    """The system's own error, in the middle of a file."""
    code = (
        "import resource, sys; from pathlib import Path; import pyarrow.parquet, torch\n"
        "from evidence_samples import token, written\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "try:\n    written(Path(sys.argv[1]), 1, *(token(n, sample_id=str(n) * 99) for n in range(600)))\n"
        "except OSError as error:\n    print(type(error).__name__, error.errno)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    process = subprocess.run(
        [sys.executable, "-B", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert process.stdout.strip() == f"OSError {errno.EFBIG}", process.stderr
    assert names(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE) != (6000, 6000)


def test_a_place_that_cannot_be_written_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        written(tmp_path / "file" / "folder")


def test_a_step_written_again_replaces_the_former_one(tmp_path):
    (written(tmp_path) / "left").write_text("of the former one")
    path = written(tmp_path, 7, token(5))
    assert names(path) == FILES
    assert names(tmp_path) == ["step_000007"]
    assert [row["row"] for row in read(path).tokens] == [5]


def test_what_a_killed_process_left_is_removed_and_never_seen(tmp_path):
    left = tmp_path / ".step_000007.0123.tmp"
    shutil.copytree(written(tmp_path / "other"), left)
    assert step_folders(tmp_path) == []
    written(tmp_path, 8)
    assert sorted(names(tmp_path)) == ["other", "step_000008"]


def test_the_newest_are_kept_and_those_of_alarms_up_to_a_bound_of_their_own(tmp_path):
    for step in range(1, 41):
        written(tmp_path, step, keep=2, alarm=step % 3 == 0)
    alarms = [step for step in range(1, 41) if step % 3 == 0][-10:]
    others = [step for step in range(1, 41) if step % 3][-2:]
    assert names(tmp_path) == [f"step_{step:06d}" for step in sorted(alarms + others)]
    assert {step.step for step in step_folders(tmp_path) if step.alarm} == set(alarms)


def test_newest_is_what_was_written_last_not_the_greatest_step(tmp_path):
    """A run that goes on from an earlier checkpoint."""
    for step in (60, 70, 80, 51, 52):
        path = written(tmp_path, step, keep=3)
        assert path.exists()
    assert [step.step for step in step_folders(tmp_path)] == [80, 51, 52]


def test_a_clock_that_was_set_back_does_not_cost_what_was_just_written(tmp_path, monkeypatch):
    written(tmp_path, 1, keep=1)
    monkeypatch.setattr(evidence_files, "datetime", type("Past", (), {"now": lambda zone: _Time()}))
    assert written(tmp_path, 2, keep=1).exists()


class _Time:
    def isoformat(self, timespec: str) -> str:
        return "1970-01-01T00:00:00.000000+00:00"


def test_what_is_not_ours_stays(tmp_path):
    for name in ("step_1", "global_step_3", "step_000004", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_000005").write_text("")
    for step in range(10, 14):
        written(tmp_path, step, keep=1)
    assert names(tmp_path) == ["global_step_3", "notes", "step_000004", "step_000005", "step_000013", "step_1"]


@pytest.mark.parametrize("wrong", ({"keep": 0}, {"step": -1}))
def test_what_is_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        written(tmp_path, **wrong)


def test_a_step_of_seven_digits_is_found_again(tmp_path):
    written(tmp_path, 1_234_567)
    assert [step.step for step in step_folders(tmp_path)] == [1_234_567]


def test_others_may_read_it_as_the_umask_says(tmp_path):
    former = os.umask(0o022)
    try:
        assert written(tmp_path).stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(former)


def test_neither_torch_nor_pyarrow_is_imported_before_they_are_needed():
    code = (
        "import sys, verl_fp16, verl_fp16.mismatch.evidence_files, verl_fp16.mismatch.evidence_reading\n"
        "print(sorted({'torch', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.stdout.strip() == "[]", process.stderr


def test_the_samples_curves_are_those_of_the_statistics():
    statistics = GapStatistics()
    statistics.add(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))
    found = statistics.curves()
    assert {kind: list(rows[0]) for kind, rows in found.items()} == {
        kind: list(rows[0]) for kind, rows in CURVES.items()
    }
