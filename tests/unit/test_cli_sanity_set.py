"""``verl-fp16 sanity-set`` with a stand-in for vLLM: what is asked, what an interruption keeps, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from verl_fp16 import sampling
from verl_fp16.cli.app import app
from verl_fp16.sampling import Answer

QUESTIONS = 12


class Sampler:
    """Answers question ``n`` right in ``n`` of its answers, the rest with "no"; the last question first."""

    asked: list = []
    interrupt_after: int | None = None

    def __init__(self, model, **settings):
        Sampler.settings = settings
        self.max_model_len = 100

    def prompt(self, messages):
        return [1] * int(messages[0]["content"].partition("long")[2] or 3)

    def room(self, tokens):
        return self.max_model_len - len(tokens) - self.settings["max_tokens"]

    def sample(self, requests):
        for number, request in enumerate(reversed(list(requests))):
            if number == self.interrupt_after:
                raise KeyboardInterrupt
            Sampler.asked.append((request.key.row, request.seed))
            right = request.key.row
            yield (
                request,
                [Answer([1], "yes" if i < right else "no", i == 0, []) for i in range(self.settings["answers"])],
            )


@pytest.fixture
def command(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setattr(sampling, "Sampler", Sampler)
    monkeypatch.setattr(Sampler, "asked", [])
    monkeypatch.setattr(Sampler, "interrupt_after", None)
    shutil.copytree(tiny_model, tmp_path / "model")
    rows = [
        {"data_source": "d", "prompt": [{"role": "user", "content": str(n)}], "reward_model": {"ground_truth": "yes"}}
        for n in range(QUESTIONS)
    ]
    write_data(tmp_path, rows)
    (tmp_path / "reward.py").write_text(
        "def score(data_source, solution_str, ground_truth, extra_info):\n"
        "    if solution_str == 'yes' and data_source == 'raises':\n        raise ValueError('odd')\n"
        "    return float(solution_str == ground_truth)\n"
    )

    def run(*more: str):
        fixed = ["--data", str(tmp_path / "data.jsonl"), "--reward", f"{tmp_path / 'reward.py'}:score"]
        settings = ["--output", str(tmp_path / "out"), "--answers", "10", "--max-tokens", "8"]
        return CliRunner().invoke(app, ["sanity-set", str(tmp_path / "model"), *fixed, *settings, *more])

    run.folder = tmp_path
    return run


def write_data(folder: Path, rows) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_questions_that_are_right_sometimes_stay(command):
    done = command()
    assert done.exit_code == 0, done.output
    kept = pq.read_table(command.folder / "out" / "train.parquet").to_pylist()
    assert [row["prompt"][0]["content"] for row in kept] == [str(n) for n in range(2, 9)]
    assert [row["accuracy"] for row in kept] == [n / 10 for n in range(2, 9)]
    assert "7 of 12 questions are right in 20% to 80%" in done.output and "1 never, 2 always" in done.output
    assert "10.0% of the answers were cut" in done.output and (command.folder / "out" / "accuracy.png").exists()
    assert "12 of 12 questions" in done.output, "the progress"
    seeds = [seed for _, seed in Sampler.asked]
    assert min(abs(a - b) for a in seeds for b in seeds if a != b) >= 4096, "answers of two questions share no seed"


def test_an_interrupted_run_goes_on_and_comes_to_the_same(command):
    Sampler.interrupt_after = 5
    stopped = command()
    assert stopped.exit_code == 130 and "the same command goes on" in stopped.output
    assert not (command.folder / "out" / "train.parquet").exists()
    Sampler.interrupt_after = None
    first = [row for row, _ in Sampler.asked]
    assert command().exit_code == 0
    again = [row for row, _ in Sampler.asked[5:]]
    assert sorted(first + again) == list(range(QUESTIONS)), "each once"
    before = (command.folder / "out" / "train.parquet").read_bytes()
    assert command("--restart").exit_code == 0
    assert (command.folder / "out" / "train.parquet").read_bytes() == before
    assert len(Sampler.asked) == 2 * QUESTIONS


def test_other_bounds_need_no_new_answers_and_other_settings_are_refused(command):
    assert command().exit_code == 0
    assert "3 of 12" in command("--low", "0.4", "--high", "0.6").output
    assert len(Sampler.asked) == QUESTIONS
    refused = command("--temperature", "0.5")
    assert refused.exit_code == 2 and "temperature was 1.0 and is 0.5" in refused.output


def test_a_limit_can_be_raised_later(command):
    assert "1 of 3 questions" in command("--limit", "3").output
    assert "7 of 12 questions" in command().output
    assert sorted(row for row, _ in Sampler.asked) == list(range(QUESTIONS))


@pytest.mark.parametrize(
    ("more", "message"),
    (
        (["--precision", "fp8"], "--precision fp8: it has to be fp16, bf16, fp32"),
        (["--low", "0.9"], "0 <= low <= high <= 1"),
        (["--reward", "nothing.py:f"], "there is no file nothing.py"),
        (["--data", "none.parquet"], "none.parquet: there is no such file"),
        (["--low", "0.95", "--high", "0.95"], "no question of"),
    ),
)
def test_wrong_input_is_one_line_and_exit_code_2(command, more, message):
    done = command(*more)
    assert done.exit_code == 2 and message in done.output
    assert done.output.strip().splitlines()[-1].startswith("verl-fp16: ")


def test_a_folder_that_is_no_model_is_named(command):
    (command.folder / "model" / "model.safetensors").unlink()
    done = command()
    assert done.exit_code == 2 and "it has a config.json and no weights" in done.output


def question(content: str, source: str = "d") -> dict:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": content}],
        "reward_model": {"ground_truth": "yes"},
    }


def test_a_prompt_that_is_too_long_is_an_error_or_passed_over(command):
    write_data(command.folder, [question("0"), question("long95"), *(question("1") for _ in range(6))])
    done = command()
    assert done.exit_code == 2
    assert "row 1: a prompt of 95 tokens and an answer are 3 tokens longer than the model's 100" in done.output
    done = command("--skip-long")
    assert done.exit_code == 0 and "1 questions were passed over: too long" in done.output


def test_a_reward_that_raises_ends_it_and_keeps_what_was_counted(command):
    write_data(command.folder, [question("0"), question("1"), question("2", "raises"), question("3"), question("4")])
    done = command()
    assert done.exit_code == 2 and "score raised ValueError: odd (row 2, answer 'yes')" in done.output
    lines = (command.folder / "out" / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines[1:]] == [4, 3]
