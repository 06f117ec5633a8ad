"""Written sums: the questions, the split into training and held-out pairs, the reward and verl's parquet files.

This module imports nothing from the package, so verl can load it by file path as its custom reward function
(``reward.custom_reward_function.path``, ``name=compute_score``) as well as by name (``pkg://``).
"""

# No `from __future__ import annotations` here: verl executes a file without registering it in sys.modules, where
# dataclasses would look to resolve annotations that are strings.

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DATA_SOURCE = "written_sums"
ABILITY = "arithmetic"
OPERAND_LIMIT = 100
HELD_OUT_PAIRS = 256

# The schema is spelled out so that an empty or odd split can never change the column types that verl reads.
_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct([("index", pa.int64()), ("split", pa.string())])),
    ]
)


@dataclass(frozen=True, order=True)
class Sum:
    """One question: ``a + b`` with both operands in ``0 .. OPERAND_LIMIT - 1``."""

    a: int
    b: int

    @property
    def question(self) -> str:
        """The question as text, for example ``12+7=``."""
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        """The sum in decimal digits, for example ``19`` (at most three digits)."""
        return str(self.a + self.b)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as chat messages, the form that verl stores and a chat template renders."""
        return [{"role": "user", "content": self.question}]


@dataclass(frozen=True)
class SumSplit:
    """All ordered pairs of operands, divided once: ``train`` and ``held_out`` share no pair."""

    train: tuple[Sum, ...]
    held_out: tuple[Sum, ...]


def split_sums(seed: int, held_out_pairs: int = HELD_OUT_PAIRS) -> SumSplit:
    """Divide the ``OPERAND_LIMIT ** 2`` ordered pairs into a shuffled training part and a held-out part.

    Pairs are held out together with their mirror image (``12+7`` and ``7+12``), because a model that saw one has all
    but seen the other.

    Args:
        seed: Decides which pairs are held out and the order of both parts.
        held_out_pairs: Number of ordered pairs to hold out.

    Raises:
        ValueError: If ``held_out_pairs`` is negative or leaves nothing to train on.
    """
    total = OPERAND_LIMIT**2
    if not 0 <= held_out_pairs < total:
        raise ValueError(f"held_out_pairs must be in 0 .. {total - 1}, got {held_out_pairs}")
    rng = random.Random(f"sums-{seed}")
    unordered = [(a, b) for a in range(OPERAND_LIMIT) for b in range(a, OPERAND_LIMIT)]
    rng.shuffle(unordered)
    train: list[Sum] = []
    held_out: list[Sum] = []
    for a, b in unordered:
        orbit = [Sum(a, b)] if a == b else [Sum(a, b), Sum(b, a)]
        # A mirrored pair that would overshoot the requested count goes to training as a whole.
        (held_out if len(held_out) + len(orbit) <= held_out_pairs else train).extend(orbit)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return SumSplit(train=tuple(train), held_out=tuple(held_out))


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> float:
    """Score one answer in verl's custom reward signature: 1.0 for exactly the right digits, otherwise 0.0.

    The comparison is of text. Surrounding whitespace, leading zeros and digits of other scripts are wrong, although
    ``int()`` would accept them: the task is to write the answer as the training data does.

    Args:
        data_source: Must be ``DATA_SOURCE``.
        solution_str: The decoded response without special tokens.
        ground_truth: The right answer in decimal digits.
        extra_info: Ignored; verl passes the row's ``extra_info`` column.
        **kwargs: Ignored; verl adds settings of its own, such as the address of a reward model.

    Raises:
        ValueError: If the row belongs to another task, which would otherwise score 0.0 without a word.
        TypeError: If ``ground_truth`` is not text, which could never equal an answer.
    """
    if data_source != DATA_SOURCE:
        raise ValueError(f"this reward scores data_source {DATA_SOURCE!r}, got {data_source!r}")
    if not isinstance(ground_truth, str):
        raise TypeError(f"ground_truth must be a str, got {type(ground_truth).__name__}")
    return 1.0 if solution_str == ground_truth else 0.0


def write_parquet(
    output_dir: str | Path, seed: int, *, train_rows: int | None = None, held_out_pairs: int = HELD_OUT_PAIRS
) -> tuple[Path, Path]:
    """Write ``train.parquet`` and ``validation.parquet`` in the row format of verl's RL dataset.

    Columns: ``data_source``, ``prompt`` (chat messages), ``ability``, ``reward_model`` (``style`` "rule" and
    ``ground_truth``) and ``extra_info`` (``index`` within the split and ``split``).

    Args:
        output_dir: Folder for both files; created if missing.
        seed: Seed of the split (see `split_sums`); use the one that the base model was trained with, or the model has
            seen validation questions.
        train_rows: Keep only the first so many training questions; all of them by default.
        held_out_pairs: Rows of the validation file.

    Returns:
        The paths of the training and the validation file.

    Raises:
        ValueError: If ``train_rows`` is not between 1 and the number of training questions.
    """
    split = split_sums(seed, held_out_pairs)
    rows = len(split.train) if train_rows is None else train_rows
    if not 1 <= rows <= len(split.train):
        raise ValueError(f"train_rows must be in 1 .. {len(split.train)}, got {train_rows}")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, sums in (("train", split.train[:rows]), ("validation", split.held_out)):
        path = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(_rows(sums, name), schema=_SCHEMA), path)
        paths.append(path)
    return paths[0], paths[1]


def _rows(sums: tuple[Sum, ...], split: str) -> list[dict[str, Any]]:
    return [
        {
            "data_source": DATA_SOURCE,
            "prompt": item.messages,
            "ability": ABILITY,
            "reward_model": {"style": "rule", "ground_truth": item.answer},
            "extra_info": {"index": index, "split": split},
        }
        for index, item in enumerate(sums)
    ]
