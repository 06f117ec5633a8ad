"""The command tokens: what it shows where, and one line for each wrong input."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evidence_samples import evidence, token, written
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from typer.testing import CliRunner

from verl_fp16.cli import output
from verl_fp16.cli import tokens as command
from verl_fp16.cli.app import app

COLUMNS = ["#", "gap", "log mu", "log pi", "mu", "pi", "position", "token in context", "sample"]
NAME_ONE = "Name a tokens.parquet, a folder step_000123, or a run's checkpoint folder (trainer.default_local_dir)"


def tokens(path: Path, *options: str):
    return CliRunner().invoke(app, ["tokens", str(path), *options])


def table(result) -> list[dict[str, str]]:
    header, *rows = (line.split("\t") for line in result.stdout.splitlines() if "\t" in line)
    return [dict(zip(header, row, strict=True)) for row in rows]


def refused(result) -> str:
    """The one line on stderr, without its beginning."""
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("verl-fp16: ")
    return line.removeprefix("verl-fp16: ")


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    for module in (command, output):
        monkeypatch.setattr(module, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", str(columns))


def test_what_is_printed_where_stdout_is_no_terminal(tmp_path):
    path = written(tmp_path, 7, token(0), token(1), token(2, sample_id=None, rank=3, log_pi=-math.inf))
    result = tokens(path)
    assert result.exit_code == 0 and result.stderr == ""
    rows = table(result)
    assert list(rows[0]) == COLUMNS
    assert [list(row.values()) for row in rows] == [
        ["1", "-inf", "-0.5", "-inf", "0.607", "0", "12/38", "bc[C]d", "rank 3 row 2"],
        ["2", "-1", "-0.5", "-1.5", "0.607", "0.223", "10/40", "bc[A]d", "sample-0"],
        ["3", "-0.5", "-0.5", "-1", "0.607", "0.368", "11/39", "bc[B]d", "sample-1"],
    ]
    lines = [line for line in result.stdout.splitlines() if "\t" not in line]
    assert lines == [
        f"{path}/tokens.parquet: step 7",
        "gap: log pi - log mu in nats, mu of the rollout, pi of the training; position: from 0 on, of the response's "
        "length",
        "of 3 tokens in the file 0% are the first of their response, 0% the last (by chance 3%); median position 11, "
        "median length 39; 1 have a log-probability that is not finite",
        "3 sequences, mean log-ratio -0.5 nats",
        "dtypes: training bfloat16, rollout float16",
        "alarm: k3 is 12 times its median",
    ]


def test_shares_of_first_and_last_tokens_and_the_size_of_the_sample(tmp_path):
    worst = [token(0, before=[], after=[]), token(1, after=[]), token(2, after=[]), token(3)]
    told = tokens(written(tmp_path, of=evidence(*worst, sequences=3, seen=2048))).stdout
    assert "of 4 tokens in the file 25% are the first of their response, 75% the last (by chance 3%); median" in told
    assert "median position 11.5, median length 38.5" in told
    assert "3 sequences of 2,048, mean log-ratio -0.5 nats" in told


@pytest.mark.parametrize(
    ("options", "numbers"),
    (
        ((), [*range(1, 21)]),
        (("--top", "3"), [1, 2, 3]),
        (("--top", "100"), [*range(1, 31)]),
        (("--top", "3", "--sort", "gap"), [1, 2, 3]),
        (("--top", "3", "--sort", "length"), [3, 2, 1]),
        (("--top", "4", "--sort", "position"), [1, 2, 3, 4]),
    ),
)
def test_top_and_sort(options, numbers, tmp_path):
    path = written(tmp_path, 7, *(token(number) for number in range(29, -1, -1)))
    result = tokens(path, *options)
    assert [int(row["#"]) for row in table(result)] == numbers
    assert [int(row["sample"].removeprefix("sample-")) + 1 for row in table(result)] == numbers
    assert (f"; {len(numbers)} of 30 are shown, --top shows more" in result.stdout) == (len(numbers) < 30)
    found = json.loads(tokens(path, *options, "--json").stdout)
    assert [row["number"] for row in found["tokens"]] == numbers


@pytest.mark.parametrize("options", (("--top", "0"), ("--sort", "size"), ()))
def test_a_wrong_call(options, tmp_path):
    result = CliRunner().invoke(app, ["tokens", *([str(written(tmp_path))] if options else []), *options])
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_json_has_everything(tmp_path):
    path = written(tmp_path, 7, token(0), token(1, log_mu=math.nan, sample_id=None))
    found = json.loads(tokens(tmp_path, "--json").stdout, parse_constant=pytest.fail)
    assert (found["file"], found["newest_of"], found["step"]) == (f"{path}/tokens.parquet", 1, 7)
    assert (found["facts"]["alarms"], found["notes"]) == (["k3 is 12 times its median"], [])
    assert found["tokens"][0] == {
        **{"number": 1, "step": 7, "rank": 0, "row": 1, "sample_id": None, "position": 11, "length": 39},
        **{"token_id": 66, "text": "B", "before": "bc", "after": "d", "before_ids": [98, 99], "after_ids": [100]},
        **{"log_mu": "nan", "log_pi": -1.0, "log_ratio": "nan"},
    }
    assert found["summary"] == {
        **{"tokens": 2, "not_finite": 1, "first_share": 0.0, "last_share": 0.0},
        "chance": pytest.approx((1 / 40 + 1 / 39) / 2),
        **{"median_position": 10.5, "median_length": 39.5, "sequences": 3, "mean_log_ratio": -0.5},
    }


@pytest.mark.parametrize("below", ("", "verl_fp16/mismatch", "mismatch"))
def test_the_newest_step_of_a_folder_is_taken_and_named(below, tmp_path):
    for step in (9, 30, 12):
        written(tmp_path / below, step, token(step))
    assert tokens(tmp_path).stdout.splitlines()[0] == (
        f"{tmp_path / below / 'step_000012'}/tokens.parquet: step 12, the newest of 3 steps"
    )
    for step in (9, 30):
        shutil.rmtree(tmp_path / below / f"step_{step:06d}")
    assert tokens(tmp_path).stdout.splitlines()[0].endswith("step 12, the only step there")
    named = tokens(tmp_path / below / "step_000012" / "tokens.parquet").stdout.splitlines()[0]
    assert named.endswith("tokens.parquet: step 12")


def test_a_folder_whose_name_looks_like_a_partition(tmp_path):
    assert tokens(written(tmp_path / "lr=1e-6" / "step=x")).exit_code == 0


def test_a_file_without_tokens_says_so(tmp_path):
    path = written(tmp_path, of=evidence(sequences=0))
    result = tokens(path)
    assert result.exit_code == 0
    assert "there is no token in it" in result.stdout.splitlines()
    found = json.loads(tokens(path, "--json").stdout)
    assert (found["tokens"], found["summary"]["mean_log_ratio"], found["summary"]["first_share"]) == ([], None, None)


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\n\t\b\u202e\u2028\u200b\u00a0\x00 \\n"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\n\t\x08\u202e\u2028\u200b\xa0\x00 \\n"


@pytest.mark.parametrize("terminal", (False, True))
def test_no_control_character_of_a_text_reaches_stdout(terminal, tmp_path, monkeypatch):
    facts = {"dtypes": {"a\x1b[31m": "b\x1bc"}, "alarms": [HOSTILE], "scalars": {}}
    path = written(tmp_path, 7, token(sample_id=HOSTILE), decode=lambda ids: HOSTILE, facts=facts)
    if terminal:
        on_a_terminal(monkeypatch, 600)
    told = tokens(path).stdout
    assert ESCAPED + "[" + ESCAPED + "]" + ESCAPED in told
    assert told.count(ESCAPED) == 5
    assert [character for character in told.replace("\t", "") if not character.isprintable()] == ["\n"] * (
        told.count("\n")
    )
    assert tokens(path, "--json").stdout.replace("\n", "").isprintable()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_what_is_visible_prints_and_says_what_the_text_was(text):
    shown = command.visible(text)
    assert shown.isprintable()
    assert ast.literal_eval("'" + shown.replace("'", "\\'") + "'") == text


def test_what_stdout_cannot_encode_is_escaped(tmp_path):
    path = written(tmp_path, 7, token(0), decode=lambda ids: "漢é😀")
    process = subprocess.run(
        [sys.executable, "-m", "verl_fp16.cli", "tokens", str(path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.returncode == 0, process.stderr
    assert r"[\u6f22\xe9\U0001f600]" in process.stdout.decode("ascii")


@pytest.mark.parametrize("columns", (20, 40, 60, 80, 100, 140, 300))
def test_a_terminal_gets_what_it_has_room_for(columns, tmp_path, monkeypatch):
    worst = [token(number, before=[97] * 16, after=[98] * 8, token_id=84) for number in range(3)]
    texts = {84: "<T>", 97: "before漢字\n", 98: "after😀"}
    path = written(tmp_path, 7, *worst, decode=lambda ids: "".join(texts[number] for number in ids))
    on_a_terminal(monkeypatch, columns)
    told = tokens(path).stdout
    box = [line for line in told.splitlines() if line[:1] in "┏┃┡│└"]
    assert {cell_len(line) for line in box} <= {min(columns, max(map(cell_len, box)))}
    assert max(map(cell_len, box)) <= columns
    left_out = re.findall("^left out for want of room: (.*); --json has everything$", told, re.M)
    header = re.sub(r"\s+", "", "".join(line for line in box if line.startswith("┃")))
    if columns >= 40:
        assert all(name in header for name in ("#", "gap", "position"))
    shown = [name for name in COLUMNS if name not in (left_out[0].split(" | ") if left_out else ())]
    assert {"#", "gap", "position", "token in context"} <= set(shown)
    if columns >= 60:
        assert told.count("[<T>]") == 3, "the token is there, whatever is cut"
        assert all(re.search(r"\[<T>\].*(after|\.\.\.)", line) for line in box if "[<T>]" in line)
    if columns == 300:
        assert not left_out and "..." in told
    if columns in (40, 60):
        assert {"sample", "mu", "pi"} <= set(left_out[0].split(" | "))


def test_an_escape_is_not_cut_in_two_and_the_nearest_context_stays():
    row = {"before": "far" + "\x1b" * 30 + "near", "text": "T", "after": "next" + "\x1b" * 30}
    for room in range(8, 150):
        text = command._in_context(row, room).plain
        assert cell_len(text) <= room
        bare = text.replace("\\x1b", "").replace("...", "")
        assert re.fullmatch("(far)?(n?e?a?)r?\\[T\\]n?e?x?t?|n?e?a?r?\\[T\\]n?e?x?t?|(far)?near\\[T\\]next", bare), text
    assert "near[T]next" in text


def without(path: Path, name: str) -> Path:
    file = path / "tokens.parquet"
    pq.write_table(pq.read_table(file).drop_columns([name]), file)
    return path


def with_column(path: Path, name: str, column) -> Path:
    file = path / "tokens.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), file)
    return path


def not_there(path: Path):
    return path / "no-such", f"{path}/no-such: there is no such file or folder. {NAME_ONE}"


def below_a_file(path: Path):
    (path / "file").write_text("")
    return path / "file" / "x", f"{path}/file/x: there is no such file or folder. {NAME_ONE}"


def empty_folder(path: Path):
    told = f"there is no folder step_000123 with a tokens.parquet in it, nor in {path}/verl_fp16/mismatch. {NAME_ONE}"
    return path, f"{path}: {told}"


def empty_file(path: Path):
    (path / "tokens.parquet").write_bytes(b"")
    return path, f"{path}/tokens.parquet: the file is empty. {NAME_ONE}"


def text_file(path: Path):
    (path / "x.txt").write_text("hello\x1b[31m")
    return path / "x.txt", f"{path}/x.txt: this is no Parquet file. {NAME_ONE}"


def device(path: Path):
    return Path(os.devnull), f"{os.devnull}: this is no file. {NAME_ONE}"


def folder_as_file(path: Path):
    (path / "tokens.parquet").mkdir()
    return path, f"{path}/tokens.parquet: this is no file. {NAME_ONE}"


def truncated(path: Path):
    file = written(path) / "tokens.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    return file, f"{file}: it cannot be read as Parquet ("


def only_its_beginning(path: Path):
    file = written(path) / "tokens.parquet"
    file.write_bytes(b"PAR1")
    return file, f"{file}: it cannot be read as Parquet ("


def a_bit_flipped(path: Path):
    file = written(path, 7, *(token(number, log_mu=-1.25) for number in range(9))) / "tokens.parquet"
    data = bytearray(file.read_bytes())
    data[data.index(b"sample-0") + 7] ^= 1
    file.write_bytes(data)
    return file, f"{file}: it cannot be read as Parquet ("


def another_table(path: Path):
    file = written(path) / "by_length.parquet"
    return file, f"{file}: there is no column rank, so this is no tokens.parquet of verl-fp16. {NAME_ONE}"


def lacks_a_column(path: Path):
    path = without(written(path), "log_pi")
    told = f"there is no column log_pi, so this is no tokens.parquet of verl-fp16. {NAME_ONE}"
    return path, f"{path}/tokens.parquet: {told}"


def has_it_twice(path: Path):
    file = written(path) / "tokens.parquet"
    table = pq.read_table(file)
    pq.write_table(table.append_column("row", table["row"]), file)
    return file, f"{file}: there is more than one column row, so "


def another_type(path: Path):
    path = with_column(written(path), "log_mu", pa.array(["a", "b"]))
    return path, f"{path}/tokens.parquet: column log_mu is string, not double. {NAME_ONE}"


def null(path: Path):
    path = with_column(written(path), "position", pa.array([None, 3]))
    return path, f"{path}/tokens.parquet: column position has rows without a value. It is damaged"


def newest_without_tokens(path: Path):
    (written(path) / "tokens.parquet").unlink()
    return path, f"{path}/step_000007: there is no tokens.parquet in it. Name another step's folder"


def step_without_tokens(path: Path):
    step = written(path)
    (step / "tokens.parquet").unlink()
    return step, f"{step}: there is no tokens.parquet in it. Name another step's folder"


def link_to_itself(path: Path):
    (path / "loop").symlink_to(path / "loop")
    return path / "loop", f"{path}/loop: it cannot be read ("


def name_too_long(path: Path):
    return path / ("x" * 300), f"{path}/{'x' * 300}: it cannot be read (File name too long). {NAME_ONE}"


WRONG = (
    *(not_there, below_a_file, empty_folder, empty_file, text_file, device, folder_as_file, truncated),
    *(only_its_beginning, a_bit_flipped, another_table, lacks_a_column, has_it_twice, another_type, null),
    *(newest_without_tokens, step_without_tokens, link_to_itself, name_too_long),
)


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
@pytest.mark.parametrize("options", ((), ("--json",)))
def test_what_cannot_be_read_is_one_line(make, options, tmp_path):
    path, told = make(tmp_path)
    line = refused(tokens(path, *options))
    assert line.startswith(told)
    assert any(fix in line for fix in ("Name ", "copy it again"))


@pytest.mark.parametrize("name", ("step_000007/tokens.parquet", "step_000007", "."))
def test_what_may_not_be_read(name, tmp_path):
    """As somebody who is not root, whom no permission stops."""
    barred = (written(tmp_path / "my run") / ".." / name).resolve()
    barred.chmod(0)
    if os.access(barred, os.R_OK):
        barred.chmod(0o700)
        pytest.skip("this user may read everything")
    result = tokens(tmp_path / "my run" / "step_000007")
    barred.chmod(0o700)
    assert refused(result).endswith(f"The owner can give it: chmod -R a+rX '{barred}'")


@pytest.mark.parametrize("named", ("", "step_000007", "step_000007/tokens.parquet"))
def test_what_the_system_bars(named, tmp_path, monkeypatch):
    """The same where the tests run as root: the system's error, made here."""
    written(tmp_path)

    def barred(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(*((Path, "iterdir", barred) if not named else ("builtins.open", barred)))
    result = CliRunner().invoke(app, ["tokens", str(tmp_path / named)])
    monkeypatch.undo()
    line = refused(result)
    assert ": there is no permission to read it. The owner can give it: chmod -R a+rX " in line


def test_what_is_damaged_beside_the_tokens_is_a_note(tmp_path):
    path = written(tmp_path)
    (path / "facts.json").write_text("[")
    (path / "sequences.parquet").write_bytes(b"PAR1PAR1")
    result = tokens(path)
    assert (result.exit_code, len(table(result))) == (0, 2)
    notes = [line for line in result.stdout.splitlines() if line.startswith("note: ")]
    assert [re.split(r"[:(]", note)[1].strip() for note in notes] == [
        f"{path}/sequences.parquet",
        f"{path}/facts.json",
    ]
    assert len(json.loads(tokens(path, "--json").stdout)["notes"]) == 2
    assert "sequences," not in result.stdout


def test_the_tokens_alone_are_enough(tmp_path):
    file = shutil.copy(written(tmp_path / "run") / "tokens.parquet", tmp_path / "mine.parquet")
    result = tokens(file)
    assert (result.exit_code, len(table(result))) == (0, 2)
    assert result.stdout.splitlines()[0] == f"{tmp_path}/mine.parquet: step 7"
    assert f"note: {tmp_path}/facts.json: it is not there; of dtypes and alarms nothing is known" in result.stdout


@pytest.mark.parametrize("facts", ({}, {"dtypes": "fp16", "alarms": "one"}, {"dtypes": [], "alarms": None}))
def test_other_facts_do_not_disturb(facts, tmp_path):
    result = tokens(written(tmp_path, facts=facts))
    assert (result.exit_code, result.stderr) == (0, "")
    assert ("dtypes: fp16\nalarm: one\n" in result.stdout) == bool(facts.get("alarms"))


def test_a_table_that_went_through_pandas(tmp_path):
    path = written(tmp_path, 7, token(0, log_mu=math.nan), token(1))
    file = path / "tokens.parquet"
    pq.write_table(pa.Table.from_pandas(pq.read_table(file).to_pandas()), file)
    assert [row["gap"] for row in table(tokens(path))] == ["+nan", "-0.5"]


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    path = written(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(tokens(path)).endswith("pyarrow is needed to read the tokens: pip install pyarrow")


@pytest.mark.parametrize("log", (0.01, 800.0, 1e300, math.inf, -800.0, math.nan))
def test_any_number_is_shown(log, tmp_path):
    path = written(tmp_path, 7, token(0, log_mu=log, log_pi=-log), token(1))
    for options in ((), ("--json",)):
        assert tokens(path, *options).exit_code == 0


@pytest.mark.parametrize("reader", ("head -c 10", "true"))
def test_a_reader_that_closes_the_pipe_sees_no_traceback(reader, tmp_path):
    path = written(tmp_path, 7, *(token(number, sample_id="x" * 9999) for number in range(60)))
    script = f"'{sys.executable}' -m verl_fp16.cli tokens '{path}' --top 60 | {reader}"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env)
    assert process.stderr == ""
