"""Final answers, and the rows that verl trains on, from the rows of data sets as people have them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_set_samples import refused, rows_of, save_lines, save_parquet
from hypothesis import given
from hypothesis import strategies as st

from verl_fp16.data_sets.answers import NoAnswer, boxed, final_answer, number_behind_mark
from verl_fp16.data_sets.converting import Options, convert
from verl_fp16.data_sets.errors import DataSetError
from verl_fp16.data_sets.tasks import TASKS
from verl_fp16.data_sets.writing import require_free, write

GSM8K, MATH = TASKS["gsm8k"], TASKS["math"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("two\n#### 72", "72"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("#### 0.75", "0.75"),
        ("#### .5", ".5"),
        ("#### 5.", "5"),
        ("####18", "18"),
        ("#### $1,000.50", "1000.50"),
        ("#### -$20", "-20"),
        ("#### +3", "3"),
        ("#### 18 dollars", "18"),
        ("#### 25%", "25"),
        ("#### $5", "5"),
        ("#### 5 dollars", "5"),
        ("#### 5 km", "5"),
        ("#### 5 m", "5"),
        ("#### 5kg", "5"),
        ("#### 5 millionaires", "5"),
        ("#### 5 of a million", "5"),
        ("#### 7\nand 3 more words", "7"),
        ("#### 1\nno, #### 2", "2"),
    ],
)
def test_the_number_behind_the_mark(text, number):
    assert number_behind_mark(text) == number


@pytest.mark.parametrize(
    "text",
    ["it is 72", "####", "#### many", "#### 1/2", "#### 3 1/2", "#### 10:30", "#### 1e6", "#### 1.2.3", "#### ٣"],
)
def test_what_is_not_one_number_is_no_answer(text):
    refused("####", number_behind_mark, text)


SCALES = "k| k|K dollars|m|M.|thousand| thousand| hundred eggs| Million| million| millions|-million|  billion| trillion"


@pytest.mark.parametrize("behind", ("½", " ½", " ¾ cups", " 三", "万", "²", *SCALES.split("|")))
def test_what_makes_another_number_of_it_is_no_answer(behind):
    refused("not one number", number_behind_mark, f"#### 3{behind}")
    refused("not one number", number_behind_mark, f"#### $1,000.5{behind}")


@given(st.integers(-(10**12), 10**12), st.sampled_from(["", " apples", ".", "\n", " %"]))
def test_any_integer_with_commas_is_found(number, behind):
    assert number_behind_mark(f"<<1+1=2>>\n#### {number:,}{behind}") == str(number)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{5}$.", "5"),
        (r"$\boxed{\frac{\sqrt{3}}{2}}$", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed{1}, no: \boxed{2} is it {really}", "2"),
        (r"\boxed 5", "5"),
        (r"it is $\boxed 5$ in $z$", "5"),
        (r"it is \(\boxed 5\), then", "5"),
        ("\\boxed 5.\nAnd {more", "5"),
        (r"\boxed \$5$", r"\$5"),
        (r"\boxed {5}", "5"),
        (r"\boxed { 5 }", "5"),
        (r"\fbox{7}", "7"),
        (r"\fbox{6} and \boxed{7} and \fbox{8}", "7"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{10\text{ cm}}", r"10\text{ cm}"),
    ],
)
def test_what_is_boxed(text, answer):
    assert boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("the answer is 5", "no .boxed"),
        (r"\boxed{5} and then \boxed{6", "not closed"),
        (r"\boxed{ }", "empty"),
        (r"\boxed $x$", "empty"),
        (r"\boxed5", "no braces"),
        (r"\boxed x}", "not balanced"),
    ],
)
def test_a_box_that_cannot_be_read_is_no_answer(text, why):
    refused(why, boxed, text)


@given(st.recursive(st.text("ab1\\ ", max_size=5), lambda inner: st.builds("{0}{{{1}}}".format, inner, inner)))
def test_anything_with_balanced_braces_comes_back_from_its_box(content):
    if content.strip():
        assert boxed(f"we get {{x}} $\\boxed{{{content}}}$, {{q.e.d.}}") == content.strip()


def test_a_final_answer_stands_alone_or_in_a_box():
    assert final_answer(r" \frac{3}{4} ") == r"\frac{3}{4}"
    assert final_answer(r"so \boxed{\frac{3}{4}}") == r"\frac{3}{4}"


@pytest.mark.parametrize(
    ("text", "why"),
    [(" ", "empty"), ("5\n#### 5", "GSM8K"), ("so " * 200, "without"), ("}{", "balanced"), ("{", "bal")],
)
def test_what_is_no_final_answer(text, why):
    with pytest.raises(NoAnswer, match=why):
        final_answer(text)


def converted(task, *files: Path, split: str = "train", **options):
    return convert(task, {split: files}, Options(**options))[split]


def truths(task, *files: Path, **options) -> list[str]:
    return [row["ground_truth"] for row in converted(task, *files, **options).table["reward_model"].to_pylist()]


def test_other_types_of_arrow_text_are_text(tmp_path):
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({name: pa.array([text], pa.string()).cast(kind) for name, text in rows_of(4)[0].items()})
        with pa.ipc.new_stream(str(tmp_path / "train.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert truths(GSM8K, tmp_path / "train.arrow") == ["4"]


def test_a_row_of_gsm8k(tmp_path):
    file = save_lines(tmp_path / "train.jsonl", [*rows_of("1,500"), {"question": "Q?", "answer": "#### 7", "more": 1}])
    made = converted(GSM8K, file)
    assert made.left_out == ()
    assert made.table.to_pylist()[0] == {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "role": "user",
                "content": 'Q1,500? Let\'s think step by step and output the final answer after "####".',
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1500"},
        "extra_info": {"split": "train", "index": 0, "question": "Q1,500?", "answer": "So it is 1,500.\n#### 1,500"},
    }
    assert len(made.table) == 2


def test_a_row_of_math(tmp_path):
    row = {"problem": "P?", "level": "Level 5", "type": "Algebra", "solution": r"So $\boxed{\frac{1}{2}}$."}
    made = converted(MATH, save_parquet(tmp_path / "test.parquet", [row]), split="test").table.to_pylist()
    assert made == [
        {
            "data_source": "DigitalLearningGmbH/MATH-lighteval",
            "prompt": [
                {
                    "role": "user",
                    "content": "P? Let's think step by step and output the final answer within \\boxed{}.",
                }
            ],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": r"\frac{1}{2}"},
            "extra_info": {"split": "test", "index": 0, "question": "P?", "answer": r"So $\boxed{\frac{1}{2}}$."},
        }
    ]


def test_the_answer_of_math_500_wins_over_its_solution(tmp_path):
    row = {"problem": "P?", "solution": r"\boxed{1}", "answer": "2", "subject": "A", "level": 1, "unique_id": "test/1"}
    file = save_lines(tmp_path / "test.jsonl", [row])
    assert truths(MATH, file) == ["2"]
    assert truths(MATH, file, answer="solution") == ["1"]


def test_a_solution_without_a_box_is_never_taken_for_an_answer(tmp_path):
    file = save_lines(tmp_path / "train.jsonl", [{"problem": "P?", "solution": "5"}])
    refused("no .boxed in its solution", truths, MATH, file)


def test_columns_of_other_names(tmp_path):
    rows = [{"prompt": "P?", "q": "Q?", "final": 12, "solution": "#### 3"}]
    file = save_lines(tmp_path / "train.jsonl", rows)
    assert converted(GSM8K, file).table["extra_info"][0].as_py()["question"] == "P?"
    made = converted(MATH, file, question="q", answer="final").table.to_pylist()[0]
    assert (made["extra_info"]["question"], made["reward_model"]["ground_truth"]) == ("Q?", "12")
    with pytest.raises(DataSetError, match="no column nope, which --answer-column names. Here are final, prompt, q"):
        truths(MATH, file, answer="nope")


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    file = save_parquet(tmp_path / "train.parquet", [{"input": "Q?", "answer": "#### 1"}])
    told = refused("there is no column question, nor problem or prompt. Here are answer, input", truths, GSM8K, file)
    assert str(file) in told
    assert "--question-column" in told
    file = save_lines(tmp_path / "train.jsonl", [{"question": "Q?", "text": "x"}])
    refused("there is no column answer, nor solution. Here are question, text.*--answer-column", truths, GSM8K, file)


def test_each_file_of_a_split_is_held_to_the_columns(tmp_path):
    first = save_lines(tmp_path / "1.jsonl", rows_of(1))
    second = save_lines(tmp_path / "2.jsonl", [{"question": "Q?"}])
    assert str(second) in refused("no column answer", truths, GSM8K, first, second)


def test_verls_own_data_needs_no_conversion(tmp_path):
    write({tmp_path / "test.parquet": converted(GSM8K, save_lines(tmp_path / "a.jsonl", rows_of(1))).table})
    file = tmp_path / "test.parquet"
    with pytest.raises(DataSetError, match=f"needs no conversion.*data.val_files={file}"):
        converted(GSM8K, file, split="test")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"question": None}, "its question is missing"),
        ({"question": 5}, "its question has to be text, and is of type int"),
        ({"question": " "}, "its question is empty"),
        ({"question": "\ud800"}, "its question has half of a character"),
        ({"answer": None}, "its answer is missing"),
        ({"answer": ["#### 1"]}, "its answer has to be text, and is of type list"),
        ({"answer": True}, "its answer has to be text, and is of type bool"),
        ({"answer": 1.0}, "its answer has to be text, and is of type float"),
        ({"answer": "none"}, "there is no #### in its answer, 'none'"),
        ({"answer": 5}, "there is no ####"),
    ],
)
def test_a_bad_row_is_named_or_left_out(tmp_path, change, why):
    rows = rows_of(0, 1, 2)
    first = save_lines(tmp_path / "1.jsonl", rows_of(8, 9))
    second = save_lines(tmp_path / "2.jsonl", [rows[0], {**rows[1], **change}, rows[2]])
    told = refused(why, truths, GSM8K, first, second)
    assert told.startswith(f"{second}, row 1 (from 0): ")
    assert told.endswith("--skip-bad")
    made = converted(GSM8K, first, second, skip_bad=True)
    (line,) = made.left_out
    assert line.startswith(f"{second}, row 1 (from 0): {why[:10]}")
    kept = made.table["extra_info"].to_pylist()
    assert [row["index"] for row in kept] == [0, 1, 2, 4], "the row's place in the split, with those left out"
    assert truths(GSM8K, first, second, skip_bad=True) == ["8", "9", "0", "2"]


def test_bad_rows_are_counted(tmp_path):
    file = save_lines(tmp_path / "train.jsonl", [{"question": "Q?", "answer": "?"}] * 3)
    refused("2 other rows are bad too", truths, GSM8K, file)
    with pytest.raises(DataSetError, match="None of the 3 rows of train is left"):
        truths(GSM8K, file, skip_bad=True)


def test_the_first_rows_of_a_split_over_its_files(tmp_path):
    first = save_lines(tmp_path / "1.jsonl", rows_of(1, 2))
    second = save_lines(tmp_path / "2.jsonl", [*rows_of(3), {"question": "bad"}])
    assert truths(GSM8K, first, second, limit=1) == ["1"]
    assert truths(GSM8K, first, tmp_path / "not read", limit=2) == ["1", "2"]
    assert truths(GSM8K, first, second, limit=3) == ["1", "2", "3"]


@pytest.mark.parametrize("save", [save_lines, lambda file, rows: file.write_text("[]")])
def test_no_rows(tmp_path, save):
    save(tmp_path / "train.json", [])
    refused("there is no row in it|the file is empty", truths, GSM8K, tmp_path / "train.json")
    pq.write_table(pa.table({"question": pa.array([], pa.string()), "answer": []}), tmp_path / "train.parquet")
    refused("there is no row in it", truths, GSM8K, tmp_path / "train.parquet")


def test_all_files_are_written_or_none(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.parquet").write_text("mine")
    table = pa.table({"a": [1]})
    written = []

    def full(table, file):
        written.append(file)
        Path(file).write_text("half")
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    refused(
        "test.parquet: it cannot be written .No space left",
        write,
        {out / f"{s}.parquet": table for s in ("train", "test")},
    )
    assert {path.name: path.read_text() for path in out.iterdir()} == {"train.parquet": "mine"}


def test_what_is_there_is_not_overwritten_unasked_and_the_data_never(tmp_path):
    file = save_lines(tmp_path / "train.parquet", rows_of(1))
    with pytest.raises(DataSetError, match="already there.*--force"):
        require_free([file], [], force=False)
    require_free([file, tmp_path / "test.parquet"], [], force=True)
    (tmp_path / "link").symlink_to(tmp_path)
    through_link = tmp_path / "link" / "train.parquet"
    for target, source in ((through_link, file), (file, through_link)):
        with pytest.raises(DataSetError, match="this is what is to be read"):
            require_free([target], [source], force=True)
    (tmp_path / "test.parquet").mkdir()
    with pytest.raises(DataSetError, match="this is a folder"):
        require_free([tmp_path / "test.parquet"], [], force=True)
