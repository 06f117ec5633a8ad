"""``verl-fp16 data``: what it prints and writes, and one line for everything that goes wrong."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from data_set_samples import rows_of, save_lines, save_parquet
from hydra.core.override_parser.overrides_parser import OverridesParser
from typer.testing import CliRunner

from verl_fp16.cli.app import app
from verl_fp16.data_sets import converting, writing
from verl_fp16.data_sets.tasks import TASKS


def data(*arguments: object):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def told(result) -> str:
    """The one line on stderr, without its beginning."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("verl-fp16: ")
    return line.removeprefix("verl-fp16: ")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture
def gsm8k(tmp_path) -> Path:
    folder = tmp_path / "gsm8k"
    save_parquet(folder / "main" / "train-00000-of-00001.parquet", rows_of("1,000", 2, -3))
    save_parquet(folder / "main" / "test-00000-of-00001.parquet", rows_of(4, 5))
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def test_what_is_printed_and_written(gsm8k, out):
    result = data("gsm8k", gsm8k, "-o", out)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "split\trows\tleft out\tfile",
        f"train\t3\t0\t{out / 'train.parquet'}",
        f"test\t2\t0\t{out / 'test.parquet'}",
        f"for verl: data.train_files={out / 'train.parquet'} data.val_files={out / 'test.parquet'}",
    ]
    assert set(content(out)) == {"train.parquet", "test.parquet"}
    train, test = (pq.read_table(out / f"{split}.parquet").to_pylist() for split in ("train", "test"))
    assert [row["reward_model"]["ground_truth"] for row in train] == ["1000", "2", "-3"]
    assert [row["extra_info"]["split"] for row in test] == ["test", "test"]


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_the_default_folder_is_the_tasks(tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    save_lines(tmp_path / "test.jsonl", [{"problem": "P?", "answer": {"gsm8k": "#### 1", "math": "1"}[task]}])
    result = data(task, "test.jsonl")
    file = Path("outputs", "data", task, "test.parquet")
    assert f"test\t1\t0\t{file}" in result.stdout.splitlines()
    assert f"for verl: data.val_files={tmp_path / file}" in result.stdout.splitlines(), "for Ray's workers absolute"
    missing = "no train split is here: verl wants data.train_files too; convert another file into the same folder with "
    assert f"{missing}--split train" in result.stdout.splitlines()
    assert file.exists()
    save_lines(tmp_path / "more.jsonl", [{"problem": "P?", "answer": {"gsm8k": "#### 1", "math": "1"}[task]}])
    more = data(task, "more.jsonl", "--split", "train")
    assert more.exit_code == 0
    assert "no test split" not in more.stdout, "it lies beside it"


def test_the_options_reach_what_they_are_of(tmp_path, out):
    rows = [{"q": "Q?", "a": f"\\boxed{{{number}}}"} for number in range(5)]
    save_lines(tmp_path / "in" / "a" / "rows.jsonl", rows)
    save_lines(tmp_path / "in" / "b" / "rows.jsonl", [{"q": None, "a": "7"}, *rows])
    asked = ["math", tmp_path / "in", "-o", out, "--split", "train", "--question-column", "q", "--answer-column", "a"]
    result = data(*asked, "--config", "b", "--config", "a", "--limit", 8, "--skip-bad")
    assert result.exit_code == 0, result.output
    truths = [row["ground_truth"] for row in pq.read_table(out / "train.parquet")["reward_model"].to_pylist()]
    assert truths == ["0", "1", "2", "3", "4", "0", "1"]
    assert f"train\t7\t1\t{out / 'train.parquet'}" in result.stdout.splitlines()
    bad = f"left out of train: {tmp_path / 'in/b/rows.jsonl'}, row 0 (from 0): its question is missing"
    assert bad in result.stdout.splitlines()


def test_of_many_rows_that_are_left_out_the_first_are_told(tmp_path, out):
    save_lines(tmp_path / "train.jsonl", [*rows_of(1), *[{"question": "Q?"}] * 10])
    lines = data("gsm8k", tmp_path / "train.jsonl", "-o", out, "--skip-bad").stdout.splitlines()
    assert sum(line.startswith("left out of train: ") for line in lines) == 4
    assert "left out of train: 7 more" in lines


def test_what_lay_in_the_folder_is_kept_unless_told_otherwise(gsm8k, out):
    data("gsm8k", gsm8k, "-o", out, "--limit", 1)
    before = content(out)
    assert told(data("gsm8k", gsm8k, "-o", out)).endswith(
        "Overwrite with --force, or name another folder with --output"
    )
    assert content(out) == before
    assert data("gsm8k", gsm8k, "-o", out, "--force").exit_code == 0
    assert pq.read_table(out / "train.parquet").num_rows == 3


def test_a_file_of_another_data_set_in_the_folder_is_pointed_out(gsm8k, out):
    data("gsm8k", gsm8k, "-o", out)
    before = content(out)
    result = data("gsm8k", gsm8k / "main" / "train-00000-of-00001.parquet", "-o", out, "--force", "--limit", 1)
    assert f"not from this data set, and as it was: {out / 'test.parquet'}" in result.stdout.splitlines()
    assert content(out)["test.parquet"] == before["test.parquet"]


def test_nothing_is_written_where_a_later_split_is_bad(gsm8k, out):
    save_parquet(gsm8k / "main" / "test-00000-of-00001.parquet", [{"question": "Q?", "answer": "?"}])
    assert "test-00000-of-00001.parquet, row 0 (from 0): there is no ####" in told(data("gsm8k", gsm8k, "-o", out))
    assert not out.exists()


def test_a_path_with_odd_characters_passes_through_a_shell_and_hydra(gsm8k, tmp_path):
    folder = tmp_path / "my data, {a=b} it's [1]"
    line = data("gsm8k", gsm8k, "-o", folder).stdout.splitlines()[-1]
    overrides = OverridesParser.create().parse_overrides(shlex.split(line.removeprefix("for verl: ")))
    assert {override.key_or_group: override.value() for override in overrides} == {
        "data.train_files": str(folder / "train.parquet"),
        "data.val_files": str(folder / "test.parquet"),
    }


def test_wrong_inputs(gsm8k, out, tmp_path):
    assert told(data("imdb", gsm8k, "-o", out)) == "imdb: there is no such data set here. Known are gsm8k, math"
    assert "Nothing is downloaded" in told(data("gsm8k", "openai/gsm8k", "-o", out))
    assert "no such configuration, but main" in told(data("gsm8k", gsm8k, "-o", out, "--config", "mian"))
    assert "there is no column x" in told(data("gsm8k", gsm8k, "-o", out, "--question-column", "x"))
    (tmp_path / "file").write_text("")
    assert "this is a file, and a folder is needed" in told(data("gsm8k", gsm8k, "-o", tmp_path / "file"))
    assert "it cannot be written" in told(data("gsm8k", gsm8k, "-o", tmp_path / "file" / "below"))
    assert not out.exists()


def test_verls_own_data_is_sent_to_verl(gsm8k, out):
    data("gsm8k", gsm8k, "-o", out)
    line = told(data("gsm8k", out, "-o", out.with_name("again")))
    assert f"data.train_files={out / 'train.parquet'}" in line


def test_an_interruption_leaves_everything_as_it_was(gsm8k, out, monkeypatch):
    data("gsm8k", gsm8k, "-o", out)
    before = content(out)

    def interrupted(table, file):
        Path(file).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", interrupted)
    result = data("gsm8k", gsm8k, "-o", out, "--force")
    assert (result.exit_code, result.stderr) == (
        130,
        "verl-fp16: interrupted; files that were there are as they were\n",
    )
    assert content(out) == before


def test_all_splits_are_converted_before_one_is_written(gsm8k, out, monkeypatch):
    calls = []
    for module, name in ((converting, "_convert_split"), (writing, "taking_its_place")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, original=original, name=name: (calls.append(name), original(*given))[1]
        )
    assert data("gsm8k", gsm8k, "-o", out).exit_code == 0
    assert calls == ["_convert_split"] * 2 + ["taking_its_place"] * 2


def test_the_page_has_every_option_and_what_rows_become():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    command = typer.main.get_command(app).commands["data"]
    options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    table = page.partition("| option |")[2].partition("\n\n")[0]
    assert set(re.findall(r"--[a-z][a-z-]+", table)) == options
    for task in TASKS.values():
        assert task.data_source in page
        assert task.instruction in page


def test_it_needs_no_network_and_imports_nothing_heavy(gsm8k, out):
    code = (
        "import sys, socket\n"
        "def barred(*given):\n    raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = barred\n"
        "from verl_fp16.cli.app import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'torch', 'verl', 'ray', 'vllm', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "data", "gsm8k", str(gsm8k), "-o", str(out)]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.splitlines()[-1] == "[]"
