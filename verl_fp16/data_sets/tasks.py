"""The data sets that can be converted, and what verl's scorer for each of them wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from verl_fp16.data_sets.answers import boxed, final_answer, number_behind_mark


@dataclass(frozen=True)
class Task:
    """How rows of one data set become verl's.

    Args:
        data_source: by this verl's ``default_compute_score`` takes the scorer.
        instruction: put behind each question, as verl's own preparation of the data set does; it asks for the form in
            which the scorer looks for the answer.
        questions: names of the question's column, the first that is there is taken.
        answers: the same of the answer's column, with what finds the final answer in its text.
        answer: the same for a column of another name.
    """

    name: str
    data_source: str
    instruction: str
    questions: tuple[str, ...]
    answers: dict[str, Callable[[str], str]]
    answer: Callable[[str], str]


TASKS = {
    task.name: task
    for task in (
        Task(
            name="gsm8k",
            data_source="openai/gsm8k",
            instruction='Let\'s think step by step and output the final answer after "####".',
            questions=("question", "problem", "prompt"),
            answers={"answer": number_behind_mark, "solution": number_behind_mark},
            answer=number_behind_mark,
        ),
        Task(
            name="math",
            data_source="DigitalLearningGmbH/MATH-lighteval",
            instruction="Let's think step by step and output the final answer within \\boxed{}.",
            questions=("problem", "question", "prompt"),
            # MATH-500 has both, and its `answer` is the final one itself.
            answers={"answer": final_answer, "solution": boxed},
            answer=final_answer,
        ),
    )
}
