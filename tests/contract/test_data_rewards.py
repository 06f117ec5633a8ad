"""What ``verl-fp16 data`` writes is what the installed verl's scorers reward, and what ``datasets`` saves is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_fp16.data_sets.converting import Options, convert
from verl_fp16.data_sets.places import find_files
from verl_fp16.data_sets.tasks import TASKS

GSM8K = {
    "#### 72": "72",
    "#### 2,125": "2125",
    "#### 1,234,567.5": "1234567.5",
    "#### -3": "-3",
    "#### -1,000": "-1000",
    "#### 0.25": "0.25",
    "#### .5": ".5",
    "#### $18": "18",
    "#### 18 dollars": "18",
    "#### 5.": "5",
    "####7": "7",
}
# The box as the solution has it: another way of writing the same answer.
MATH = {
    r"\boxed{5}": "5",
    r"\boxed 5": "5",
    r"\fbox{6}": "6",
    r"\boxed{1,\!234}": "1,234",
    r"\boxed{-\frac{3}{4}}": r"-\dfrac{3}{4}",
    r"\boxed{\frac12}": "1/2",
    r"\boxed{0.5}": r"\frac{1}{2}",
    r"\boxed{\frac{\sqrt{a^{2}+b^{2}}}{2}}": r"\frac{\sqrt{a^{2} + b^{2}}}{2}",
    r"\boxed{10\text{ cm}}": "10",
    r"\boxed{x=4}": "4",
    r"\boxed{90^\circ}": "90",
    r"\boxed{\$3.50}": "3.50",
    r"\boxed{25\%}": "25",
    r"\boxed{\{1, 2\}}": r"\{1,2\}",
    r"\boxed{(-\infty, 3]}": r"\left(-\infty,3\right]",
    r"\boxed{\text{(A)}}": r"\text{(A)}",
    r"\boxed{\begin{pmatrix} 1 & 0 \\ 0 & -1 \end{pmatrix}}": r"\begin{pmatrix} 1 & 0 \\ 0 & -1 \end{pmatrix}",
    r"\boxed{\text{5 cm and }\text{ 6 cm}}": r"\text{5 cm and }\text{ 6 cm}",
}


def made_of(task: str, rows: list[dict], folder: Path) -> list[dict]:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return convert(TASKS[task], find_files(file).splits, Options())["train"].table.to_pylist()


def score(row: dict, response: str) -> float:
    from verl.utils.reward_score import default_compute_score

    return default_compute_score(row["data_source"], response, row["reward_model"]["ground_truth"], row["extra_info"])


def test_verl_rewards_the_answers_of_gsm8k(tmp_path):
    rows = made_of("gsm8k", [{"question": "Q?", "answer": f"So.\n{answer}"} for answer in GSM8K], tmp_path)
    assert [row["data_source"] for row in rows] == ["openai/gsm8k"] * len(GSM8K)
    for row, truth in zip(rows, GSM8K.values(), strict=True):
        assert row["reward_model"] == {"style": "rule", "ground_truth": truth}
        assert score(row, f"We count {truth}9 and get #### {truth}") == 1
        assert score(row, f"We get\n#### {truth}9") == 0
        assert score(row, f"We get {truth}") == 0


def test_verl_rewards_the_answers_of_math(tmp_path):
    rows = made_of("math", [{"problem": "P?", "solution": f"So ${box}$ it is."} for box in MATH], tmp_path)
    for row, other in zip(rows, MATH.values(), strict=True):
        truth = row["reward_model"]["ground_truth"]
        assert score(row, f"We get $\\boxed{{{truth}}}$.") == 1, truth
        assert score(row, f"Not \\boxed{{17}}, but $\\boxed{{{other}}}$.") == 1, (truth, other)
        assert score(row, "We get $\\boxed{17}$.") == 0, truth
        assert score(row, f"We get {truth}") == 0


def test_verl_rewards_final_answers_that_stand_alone(tmp_path):
    answers = [r"\left( 3, \frac{\pi}{2} \right)", "-7", r"3\sqrt{13}", r"\text{Evelyn}", "p - q"]
    rows = made_of("math", [{"problem": "P?", "solution": "\\boxed{0}", "answer": text} for text in answers], tmp_path)
    for row, answer in zip(rows, answers, strict=True):
        assert score(row, f"\\boxed{{{answer}}}") == 1, answer
        assert score(row, "\\boxed{0}") == 0


@pytest.mark.parametrize("shards", [1, 2])
def test_what_datasets_saves_is_read_without_it(tmp_path, shards):
    import datasets

    datasets.disable_progress_bars()
    rows = {"question": [f"Q{number}" for number in range(6)], "answer": [f"#### {number}" for number in range(6)]}
    whole = datasets.Dataset.from_dict(rows, split="train")
    # A part of train is saved as test with the state of train, and a selection through its indices.
    saved = datasets.DatasetDict({"train": whole.shuffle(seed=0), "test": whole.select([1, 4])})
    saved.save_to_disk(tmp_path / "data", num_shards={"train": shards, "test": 1})
    made = convert(TASKS["gsm8k"], find_files(tmp_path / "data").splits, Options())
    for split in ("train", "test"):
        questions = [row["question"] for row in made[split].table["extra_info"].to_pylist()]
        assert questions == saved[split]["question"][:]
    whole.save_to_disk(tmp_path / "one")
    assert list(find_files(tmp_path / "one").splits) == ["train"]


def test_verls_own_reader_takes_the_rows(tmp_path):
    """Through ``datasets``, as verl's data set reads Parquet: nested fields come back as they were."""
    import datasets
    import pyarrow.parquet as pq

    datasets.disable_progress_bars()
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "Q?", "answer": "#### 1"}))
    table = convert(TASKS["gsm8k"], find_files(tmp_path / "train.jsonl").splits, Options())["train"].table
    pq.write_table(table, tmp_path / "train.parquet")
    read = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert read["train"][0] == table.to_pylist()[0]
