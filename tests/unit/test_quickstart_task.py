"""The arithmetic task: disjoint splits, the reward, and the files that verl reads."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_fp16.quickstart import task

pytestmark = pytest.mark.unit


def test_split_covers_every_pair_once() -> None:
    split = task.split_sums(seed=1)
    assert len(split.held_out) == task.HELD_OUT_PAIRS
    pairs = [(item.a, item.b) for item in (*split.train, *split.held_out)]
    assert sorted(pairs) == [(a, b) for a in range(100) for b in range(100)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_training_never_sees_a_held_out_pair_or_its_mirror(seed: int) -> None:
    split = task.split_sums(seed)
    train = {frozenset((item.a, item.b)) for item in split.train}
    assert train.isdisjoint(frozenset((item.a, item.b)) for item in split.held_out)


def test_split_depends_on_the_seed_alone() -> None:
    assert task.split_sums(1) == task.split_sums(1)
    assert task.split_sums(1).held_out != task.split_sums(2).held_out


@pytest.mark.parametrize("count", [-1, 10_000])
def test_split_refuses_impossible_sizes(count: int) -> None:
    with pytest.raises(ValueError, match="held_out_pairs"):
        task.split_sums(1, count)


@given(st.integers(0, 99), st.integers(0, 99))
def test_question_and_answer_agree(a: int, b: int) -> None:
    item = task.Sum(a, b)
    left, right = item.question.removesuffix("=").split("+")
    assert int(left) + int(right) == int(item.answer)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("19", 1.0),
        ("18", 0.0),
        ("", 0.0),
        ("?", 0.0),
        ("190", 0.0),
        ("1", 0.0),
        ("019", 0.0),
        (" 19", 0.0),
        ("19\n", 0.0),
        ("19.0", 0.0),
        ("+19", 0.0),
        ("１９", 0.0),  # full-width digits, which int() would accept
        ("\ufffd\x00\u202e19", 0.0),
    ],
)
def test_reward_is_exact(answer: str, score: float) -> None:
    result = task.compute_score(data_source=task.DATA_SOURCE, solution_str=answer, ground_truth="19", extra_info={})
    assert result == score
    assert type(result) is float


@given(st.text())
def test_reward_never_fails_on_text(answer: str) -> None:
    assert task.compute_score(task.DATA_SOURCE, answer, "19") == float(answer == "19")


def test_reward_ignores_further_keywords() -> None:
    assert task.compute_score(task.DATA_SOURCE, "7", "7", None, reward_router_address="host:1") == 1.0


def test_reward_refuses_rows_that_could_only_score_zero() -> None:
    with pytest.raises(ValueError, match="openai/gsm8k"):
        task.compute_score("openai/gsm8k", "19", "19")
    with pytest.raises(TypeError, match="int"):
        task.compute_score(task.DATA_SOURCE, "19", 19)  # type: ignore[arg-type]


def test_reward_loads_by_file_path() -> None:
    spec = importlib.util.spec_from_file_location("custom_reward", task.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Like verl's loader, without an entry in sys.modules.
    spec.loader.exec_module(module)
    assert module.compute_score(task.DATA_SOURCE, "3", "3") == 1.0


def test_parquet_rows_are_those_of_the_split(tmp_path: Path) -> None:
    train_path, validation_path = task.write_parquet(tmp_path / "data", seed=2)
    split = task.split_sums(2)
    for path, name, sums in ((train_path, "train", split.train), (validation_path, "validation", split.held_out)):
        frame = pd.read_parquet(path)
        assert list(frame.columns) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
        assert set(frame["data_source"]) == {task.DATA_SOURCE}
        assert [row[0]["content"] for row in frame["prompt"]] == [item.question for item in sums]
        assert all(len(row) == 1 and row[0]["role"] == "user" for row in frame["prompt"])
        assert [row["ground_truth"] for row in frame["reward_model"]] == [item.answer for item in sums]
        assert {row["style"] for row in frame["reward_model"]} == {"rule"}
        assert [row["index"] for row in frame["extra_info"]] == list(range(len(sums)))
        assert {row["split"] for row in frame["extra_info"]} == {name}


def test_parquet_files_are_equal_for_a_seed(tmp_path: Path) -> None:
    first = task.write_parquet(tmp_path / "a", seed=1, train_rows=50)
    again = task.write_parquet(tmp_path / "b", seed=1, train_rows=50)
    other = task.write_parquet(tmp_path / "c", seed=2, train_rows=50)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert first[0].read_bytes() != other[0].read_bytes()
    assert len(pd.read_parquet(first[0])) == 50


@pytest.mark.parametrize("rows", [0, 9_745])
def test_parquet_refuses_impossible_sizes(tmp_path: Path, rows: int) -> None:
    with pytest.raises(ValueError, match="train_rows"):
        task.write_parquet(tmp_path, seed=1, train_rows=rows)
