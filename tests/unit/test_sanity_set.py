"""The sanity set's parts: questions and their errors, the reward, progress over interruptions, what stays."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_fp16.made_of import digest_of_model
from verl_fp16.rows import RowsError
from verl_fp16.sanity_set import questions, reward, selection
from verl_fp16.sanity_set.errors import SanitySetError
from verl_fp16.sanity_set.progress import Counted, Progress

ROW = {
    "data_source": "sums",
    "prompt": [{"role": "user", "content": "1+1="}],
    "ability": "arithmetic",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 7},
}


def json_lines(folder: Path, *rows) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def parquet(folder: Path, rows: list[dict]) -> Path:
    file = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("write", (lambda folder: json_lines(folder, ROW, "", ROW), lambda f: parquet(f, [ROW, ROW])))
def test_questions_are_read_from_either_format(tmp_path, write):
    file = write(tmp_path)
    first, second = questions.read(file)
    assert (first.row, second.row, first.ground_truth, first.extra_info) == (0, 1, "2", {"index": 7})
    assert first.messages == ROW["prompt"]


@pytest.mark.parametrize(
    ("rows", "message"),
    (
        ([], "the file is empty"),
        ([""], "there is no row in it"),
        (["{"], "line 1: this is no JSON"),
        (["3"], "line 1: this is no JSON object"),
        (
            [ROW, {k: v for k, v in ROW.items() if k != "prompt"}],
            "line 2: there is no column prompt. Needed are prompt, data_source",
        ),
        ([{**ROW, "prompt": "1+1="}], "row 0: prompt has to be a list of messages"),
        ([{**ROW, "prompt": []}], "row 0: prompt has to be a list of messages"),
        ([{**ROW, "reward_model": {}}], "row 0: reward_model has no ground_truth"),
        ([{**ROW, "extra_info": "hard"}], "row 0: extra_info has to be an object"),
    ),
)
def test_what_is_no_question_is_named(tmp_path, rows, message):
    with pytest.raises((RowsError, SanitySetError), match=message):
        list(questions.read(json_lines(tmp_path, *rows)))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises((RowsError, SanitySetError), match="there is no such file"):
        list(questions.read(tmp_path / "none.parquet"))
    with pytest.raises((RowsError, SanitySetError), match="this is a folder"):
        list(questions.read(tmp_path))
    with pytest.raises((RowsError, SanitySetError), match="there is no column reward_model"):
        list(questions.read(parquet(tmp_path, [{k: v for k, v in ROW.items() if k != "reward_model"}])))


REWARD = """
def right(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)

def mapping(**kwargs):
    return {"score": -1.0, "acc": kwargs["solution_str"] == "2"}

def raises(**kwargs):
    raise KeyError("unheard of")

def nothing(**kwargs):
    return None

def of_two_lines(**kwargs):
    raise ValueError("one\\ntwo")
"""


@pytest.fixture
def rewards(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text(REWARD)
    return file


def question():
    return questions.Question(4, ROW["prompt"], "sums", "2", {})


@pytest.mark.parametrize("name", ("right", "mapping"))
def test_the_reward_is_called_as_verl_calls_it(rewards, name):
    found = reward.load_reward(f"{rewards}:{name}")
    assert (found(question(), "2"), found(question(), "3")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("named", "message"),
    (
        ("{}", "it has to be FILE.py:FUNC, such as reward.py:compute_score, or verl for verl's own"),
        ("{}:", "it has to be FILE.py:FUNC"),
        ("{}:unknown", "there is no function unknown"),
        ("{}.gone:right", "there is no file"),
    ),
)
def test_a_reward_that_is_not_there_is_named(rewards, named, message):
    with pytest.raises(SanitySetError, match=message):
        reward.load_reward(named.format(rewards))


@pytest.mark.parametrize(
    ("text", "message"), (("import nobody_has_this", "ModuleNotFoundError"), ("raise SystemExit(0)", "SystemExit"))
)
def test_a_module_that_does_not_load_is_named(tmp_path, text, message):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(SanitySetError, match=f"does not load: {message}"):
        reward.load_reward(f"{tmp_path / 'broken.py'}:right")


@pytest.mark.parametrize(
    ("name", "message"),
    (
        ("raises", "raised KeyError: 'unheard of' .row 4, answer '2'"),
        ("nothing", "returned None"),
        ("of_two_lines", "raised ValueError: one two .row 4"),
    ),
)
def test_a_reward_that_fails_names_its_row(rewards, name, message):
    with pytest.raises(SanitySetError, match=message):
        reward.load_reward(f"{rewards}:{name}")(question(), "2")


def sourced(source: str):
    return questions.Question(4, ROW["prompt"], source, "2", {})


def test_verls_own_scores_go_by_data_source(verls_scores):
    found = reward.load_reward("verl")
    for source in ("sums", "strict"):
        found.check(sourced(source))  # with no answer, for which the strict one raises
        assert (found(sourced(source), "2"), found(sourced(source), "3")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("source", "message"),
    (
        ("mine", "verl has no score for data_source 'mine' .row 4.. Give a function of your own, as --reward FILE.py"),
        ("needs", "'needs' .row 4. does not load: ModuleNotFoundError: .*nobody_has_this.* or give a function of your"),
    ),
)
def test_a_data_source_that_verl_cannot_score_is_named_with_its_row(verls_scores, source, message):
    with pytest.raises(SanitySetError, match=message):
        reward.load_reward("verl").check(sourced(source))


def test_verls_own_scores_are_others_when_any_of_their_files_is_changed(verls_scores):
    before = reward.load_reward("verl").identity
    assert reward.load_reward("verl").identity == before
    (verls_scores / "gsm8k.py").write_text("changed = True\n")
    assert reward.load_reward("verl").identity != before


def test_verls_own_scores_where_there_is_no_verl(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(SanitySetError, match="verl is not installed in this environment. Install it, or give"):
        reward.load_reward("verl")


def test_verls_own_scores_where_verl_is_broken(verls_scores, monkeypatch):
    (verls_scores / "__init__.py").write_text("import nobody_has_this")
    with pytest.raises(SanitySetError, match="verl.utils.reward_score does not load: ModuleNotFoundError"):
        reward.load_reward("verl")


_REAL = """
from verl_fp16.sanity_set.questions import Question
from verl_fp16.sanity_set.reward import load_reward
found = load_reward("verl")
for source, right in (("openai/gsm8k", "#### 2"), ("lighteval/MATH", "\\\\boxed{2}"), ("math_dapo", "Answer: 2")):
    question = Question(0, [], source, "2", {})
    found.check(question)
    print(found(question, right) >= 1, found(question, "3") >= 1)
"""


def test_the_installed_verl_scores_what_it_prepares():
    done = subprocess.run([sys.executable, "-c", _REAL], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True", "False"] * 3, done.stderr[-2000:]


MADE_OF = {"model": "abc", "seed": 0}


def test_progress_goes_on_where_it_was(tmp_path):
    file = tmp_path / "new" / "progress.jsonl"
    kept = Progress(file, MADE_OF)
    kept.add(Counted(0, 40, 8, 1))
    kept.add(Counted(3, 40, 40, 0))
    kept.close()
    with open(file, "ab") as log:
        log.write(b'{"row": 5, "answ')  # a crash
    again = Progress(file, MADE_OF)
    assert again.counted == {0: Counted(0, 40, 8, 1), 3: Counted(3, 40, 40, 0)}
    again.add(Counted(5, 40, 2, 0))
    again.close()
    assert Progress(file, MADE_OF).counted.keys() == {0, 3, 5}


def test_progress_of_something_else_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "progress.jsonl"
    kept = Progress(file, MADE_OF)
    kept.add(Counted(0, 40, 8, 1))
    kept.close()
    before = file.read_bytes()
    with pytest.raises(SanitySetError, match="seed was 0 and is 1.*--restart"):
        Progress(file, {**MADE_OF, "seed": 1})
    assert file.read_bytes() == before


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    kept = Progress(tmp_path / "progress.jsonl", MADE_OF)
    kept.add(Counted(0, 40, 8, 1))

    def full(entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "_append", full)
    with pytest.raises(SanitySetError, match="No space left on device"):
        kept.add(Counted(1, 40, 8, 1))
    kept.close()
    assert Progress(tmp_path / "progress.jsonl", MADE_OF).counted.keys() == {0}


class Full(io.FileIO):
    """A disk with room for ten more bytes."""

    left = 10

    def write(self, data):
        if not self.left:
            raise OSError(28, "No space left on device")
        written = super().write(bytes(data)[: self.left])
        self.left -= written
        return written


def test_half_a_line_on_a_full_disk_is_taken_back_and_not_written_at_the_end(tmp_path):
    kept = Progress(tmp_path / "progress.jsonl", MADE_OF)
    kept.add(Counted(0, 40, 8, 1))
    before = (tmp_path / "progress.jsonl").read_bytes()
    log, kept._log = kept._log, Full(tmp_path / "progress.jsonl", "r+b")
    log.close()
    kept._log.seek(0, 2)
    with pytest.raises(SanitySetError, match="No space left on device"):
        kept.add(Counted(1, 40, 8, 1))
    kept.close()
    assert (tmp_path / "progress.jsonl").read_bytes() == before


def test_progress_in_which_nothing_was_counted_binds_nobody(tmp_path):
    file = tmp_path / "progress.jsonl"
    Progress(file, MADE_OF).close()
    other = {**MADE_OF, "seed": 1}
    kept = Progress(file, other)
    kept.add(Counted(0, 40, 8, 1))
    kept.close()
    assert Progress(file, other).counted.keys() == {0}
    with pytest.raises(SanitySetError, match="seed was 1 and is 0"):
        Progress(file, MADE_OF)


@pytest.mark.parametrize(
    ("damaged", "message"),
    (
        (lambda lines: [b"somebody's notes\n", *lines[1:]], "this is no progress of a sanity set"),
        (lambda lines: [*lines[:1], b"\0" * 20 + b"\n", *lines[2:]], "line 2: it is damaged"),
        (lambda lines: [*lines[:2], b'{"row": 5}\n'], "line 3: it is damaged"),
        (lambda lines: [*lines[:2], b'{"row": 5, "answers": 0, "correct": 0, "cut": 0}\n'], "line 3: it is damaged"),
        (lambda lines: [b"somebody's only line, and no end to it"], "this is no progress of a sanity set"),
    ),
)
def test_damaged_progress_is_named_and_left_alone(tmp_path, damaged, message):
    file = tmp_path / "progress.jsonl"
    kept = Progress(file, MADE_OF)
    for row in range(3):
        kept.add(Counted(row, 40, 8, 1))
    kept.close()
    file.write_bytes(b"".join(damaged(file.read_bytes().splitlines(keepends=True))))
    before = file.read_bytes()
    with pytest.raises(SanitySetError, match=message):
        Progress(file, MADE_OF)
    assert file.read_bytes() == before


def test_a_header_that_a_crash_left_half_written_is_written_anew(tmp_path):
    file = tmp_path / "progress.jsonl"
    file.write_bytes(b'{"made_of": {"model": "a')
    Progress(file, MADE_OF).close()
    assert json.loads(file.read_text()) == {"made_of": MADE_OF}


@pytest.mark.parametrize(
    ("correct", "answers", "stays"),
    ((7, 40, False), (8, 40, True), (32, 40, True), (33, 40, False), (1, 5, True), (2, 10, True), (0, 5, False)),
)
def test_the_bounds_are_inclusive_in_answers(correct, answers, stays):
    assert selection.Bounds(0.2, 0.8).keep(Counted(0, answers, correct, 0)) is stays


@pytest.mark.parametrize("bounds", ((0.8, 0.2), (-0.1, 0.5), (0.5, 1.1)))
def test_bounds_that_make_no_sense_are_refused(bounds):
    with pytest.raises(SanitySetError, match="0 <= low <= high <= 1"):
        selection.Bounds(*bounds)


@pytest.mark.parametrize("write", (lambda folder, rows: json_lines(folder, *rows), parquet))
def test_what_stays_is_verls_data_with_the_measured_accuracy(tmp_path, write):
    rows = [{**ROW, "extra_info": {"index": index}} for index in range(600)]
    data = write(tmp_path, rows)
    counted = {row: Counted(row, 40, row % 41, row % 3) for row in range(600)}
    bounds = selection.Bounds()
    summary = selection.summarise(counted.values(), bounds, {"answers": 40})
    file = selection.write(data, tmp_path, counted, bounds, summary)
    kept = pq.read_table(file).to_pylist()
    expected = [row for row in range(600) if 8 <= row % 41 <= 32]
    assert [row["extra_info"]["index"] for row in kept] == expected and summary["kept"] == len(expected)
    assert {name: kept[0][name] for name in ROW if name != "extra_info"} == {
        k: v for k, v in ROW.items() if k != "extra_info"
    }
    assert [row["accuracy"] for row in kept] == [row % 41 / 40 for row in expected]
    assert sum(summary["histogram"]) == 600 and summary["histogram"][-1] == summary["always_right"] == 14
    assert json.loads((tmp_path / selection.SUMMARY).read_text())["kept"] == len(expected)
    assert selection.draw(summary, tmp_path / "a.png", "model").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob(".*.tmp"))


def test_every_column_is_carried_along_whichever_row_has_it(tmp_path):
    rows = [{**ROW, "extra_info": {"index": row}} for row in range(600)]
    rows[3]["note"] = "of one row"
    rows[500]["extra_info"]["source"] = "late"
    rows[500]["tags"] = ["a"]
    rows[0]["tags"] = None
    counted = {row: Counted(row, 40, 20, 0) for row in range(600)}
    bounds = selection.Bounds()
    summary = selection.summarise(counted.values(), bounds, {})
    kept = pq.read_table(selection.write(json_lines(tmp_path, *rows), tmp_path, counted, bounds, summary)).to_pylist()
    assert kept[3]["note"] == "of one row" and kept[4]["note"] is None
    assert kept[500]["extra_info"] == {"index": 500, "source": "late"} and kept[500]["tags"] == ["a"]


def test_the_histogram_tells_those_that_stay_in_a_bin_of_both(tmp_path):
    rows = [Counted(0, 40, 32, 0), Counted(1, 40, 33, 0), Counted(2, 40, 33, 0)]
    summary = selection.summarise(rows, selection.Bounds(), {})
    assert (summary["histogram"][16], summary["histogram_kept"][16]) == (3, 1)
    assert sum(summary["histogram_kept"]) == summary["kept"] == 1


def test_a_set_of_nothing_says_so_and_replaces_nothing(tmp_path):
    counted = {0: Counted(0, 40, 0, 0), 1: Counted(1, 40, 40, 0)}
    bounds = selection.Bounds()
    summary = selection.summarise(counted.values(), bounds, {})
    (tmp_path / selection.PARQUET).write_text("former")
    with pytest.raises(
        SanitySetError,
        match="1 of 2 were never right, 1 always. Set other --low and --high.*train.parquet is of other bounds",
    ):
        selection.write(json_lines(tmp_path, ROW, ROW), tmp_path, counted, bounds, summary)
    assert (tmp_path / selection.PARQUET).read_text() == "former"


def test_the_digest_of_a_model_is_that_of_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"123")
    before = digest_of_model(tmp_path)
    assert digest_of_model(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    assert digest_of_model(tmp_path) != before
