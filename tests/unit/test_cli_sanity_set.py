"""``verl-fp16 sanity-set`` with a stand-in for vLLM: what is asked, what an interruption keeps, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
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
    fails = False

    def __init__(self, model, **settings):
        Sampler.settings = settings

    def sample(self, requests):
        if self.fails:
            raise sampling.SamplingError("vLLM stopped: its engine died")
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
    monkeypatch.setattr(Sampler, "fails", False)
    monkeypatch.setattr(Sampler, "settings", None, raising=False)
    shutil.copytree(tiny_model, tmp_path / "model")
    command_model.path = tmp_path / "model"
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
    assert (
        "7 of 12 questions stay, right in 20% to 80%" in done.output
        and "2 are below (1 never right), 3 above (2 always)" in done.output
    )
    assert "10.0% of the answers were cut" in done.output and (command.folder / "out" / "accuracy.png").exists()
    assert "12 of 12 questions" in done.output, "the progress"
    seeds = [seed for _, seed in Sampler.asked]
    assert min(abs(a - b) for a in seeds for b in seeds if a != b) >= 4096, "answers of two questions share no seed"


def test_the_summary_says_what_the_set_was_made_of(command):
    assert command("--seed", "3", "--limit", "4").exit_code == 0
    made_of = json.loads((command.folder / "out" / "summary.json").read_text())["settings"]
    paths = {"model": "model", "data": "data.jsonl", "reward": "reward.py:score"}
    assert {name: made_of[name] for name in paths} == {name: str(command.folder / at) for name, at in paths.items()}
    assert (made_of["seed"], made_of["answers"], made_of["precision"]) == (3, 10, "fp16")


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


def apply_template(content: str) -> list[int]:
    from transformers import AutoTokenizer

    from verl_fp16.prompt_tokens import tokenize

    return tokenize(AutoTokenizer.from_pretrained(command_model.path), [{"role": "user", "content": content}])


class command_model:
    path: Path


def question(content: str, source: str = "d") -> dict:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": content}],
        "reward_model": {"ground_truth": "yes"},
    }


def test_a_prompt_that_is_too_long_is_an_error_or_passed_over(command):
    length = len(apply_template("1"))
    write_data(command.folder, [question("0"), question("1" * 200), *(question("1") for _ in range(6))])
    done = command()
    assert done.exit_code == 2 and Sampler.settings is None, "it is told before vLLM is loaded"
    assert (
        f"row 1: the prompt has {length + 199} tokens, and beside its answer the model has room for 120" in done.output
    )
    done = command("--skip-long")
    assert Sampler.settings["max_model_len"] == length + 8, "vLLM is built for the tokens that there are"
    assert done.exit_code == 0 and "1 questions were passed over: too long" in done.output


def test_a_reward_that_raises_ends_it_and_keeps_what_was_counted(command):
    write_data(command.folder, [question("0"), question("1"), question("2", "raises"), question("3"), question("4")])
    done = command()
    assert done.exit_code == 2 and "score raised ValueError: odd (row 2, answer 'yes')" in done.output
    lines = (command.folder / "out" / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines[1:]] == [4, 3]


def last_line(done, code: int = 2) -> str:
    assert done.exit_code == code and "Traceback" not in done.output, (done.output, done.exception)
    return done.output.strip().splitlines()[-1]


def test_what_was_refused_before_anything_was_counted_binds_nobody(command):
    write_data(command.folder, [question("1" * 100), *(question("1") for _ in range(6))])
    assert "Set a shorter --max-tokens" in last_line(command("--max-tokens", "40"))
    assert command("--max-tokens", "4").exit_code == 0


def test_a_tokenizer_without_a_chat_template_is_one_line(command):
    folder = command.folder / "model"
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "the model's tokenizer has no chat template" in last_line(command())


def test_vllm_that_stops_is_one_line_and_keeps_what_was_counted(command):
    assert command("--limit", "3").exit_code == 0
    Sampler.fails = True
    assert last_line(command()) == "verl-fp16: vLLM stopped: its engine died"
    assert len((command.folder / "out" / "progress.jsonl").read_text().splitlines()) == 4


def test_gpus_that_a_layer_is_spread_over_are_not_mixed(command):
    assert command("--limit", "3").exit_code == 0
    assert "tensor_parallel_size was 1 and is 2" in last_line(command("--tensor-parallel-size", "2"))


@pytest.mark.parametrize(
    "where", ("selection.draw", "progress.Progress", "selection.write_whole", "reward.load_reward")
)
def test_a_full_disk_is_one_line_wherever_it_is_met(command, monkeypatch, where):
    from verl_fp16.sanity_set import progress, reward, selection

    module, _, name = where.partition(".")

    def full(*arguments):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr({"progress": progress, "reward": reward, "selection": selection}[module], name, full)
    assert "No space left on device" in last_line(command())


@pytest.mark.parametrize("option", (("--top-p", "0"), ("--temperature", "0"), ("--temperature", "-1")))
def test_sampling_that_vllm_would_refuse_is_refused_before_it_is_loaded(command, option):
    assert option[0] in last_line(command(*option)) or option[0] in command(*option).output
    assert Sampler.settings is None


def test_an_answer_is_right_from_the_reward_that_was_asked_for_and_others_are_not_mixed(command):
    (command.folder / "reward.py").write_text(
        "def score(solution_str, **more): return 0.25 + (solution_str == 'yes') / 4\n"
    )
    done = command("--correct-from", "0.5")
    assert "7 of 12 questions" in done.output and "(1 never right)" in done.output and "(2 always)" in done.output
    assert "correct_from was 0.5 and is 0.25" in last_line(command("--correct-from", "0.25"))
    assert (
        "0 are below (0 never right), 0 above (12 always)"
        in command("--correct-from", "0.25", "--low", "1", "--high", "1", "--restart").output
    )


def test_verls_own_scores_judge_and_a_source_that_it_does_not_know_costs_no_sampling(command, verls_scores):
    write_data(command.folder, [question(str(n), "sums") for n in range(10)] + [question("10")])
    told = last_line(command("--reward", "verl"))
    assert "verl has no score for data_source 'd' (row 10)" in told and "--reward FILE.py:FUNC" in told
    assert Sampler.settings is None
    done = command("--reward", "verl", "--limit", "10")
    assert done.exit_code == 0 and "7 of 10 questions stay" in done.output
    summary = json.loads((command.folder / "out" / "summary.json").read_text())
    assert summary["settings"]["reward"] == "verl"


def test_verls_own_scores_go_on_where_they_were_unless_they_or_the_function_is_another(command, verls_scores):
    write_data(command.folder, [question(str(n), "sums") for n in range(10)])
    verls = ("--reward", "verl")
    Sampler.interrupt_after = 5
    assert command(*verls).exit_code == 130
    Sampler.interrupt_after = None
    another = "the reward function is another, or its file was changed"
    assert another in last_line(command()), "a file's"
    assert command(*verls).exit_code == 0
    assert sorted(row for row, _ in Sampler.asked) == list(range(10)), "each once"
    (verls_scores / "gsm8k.py").write_text("changed = True\n")
    assert another in last_line(command(*verls, "--low", "0.1"))


def test_verls_own_scores_need_verl(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    assert "verl is not installed in this environment" in last_line(command("--reward", "verl"))
