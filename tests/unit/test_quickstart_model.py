"""The quickstart's tokenizer, sampler and base model, with trainings of a few steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from verl_fp16.quickstart import base_model
from verl_fp16.quickstart.base_model import (
    BaseAccuracyError,
    BaseRecipe,
    accuracy,
    base_config,
    sample_answers,
    train_base_model,
)
from verl_fp16.quickstart.task import Sum, split_sums
from verl_fp16.quickstart.tokenizer import (
    IGNORED_LABEL,
    VOCABULARY_SIZE,
    build_tokenizer,
    byte_symbols,
    encode_answers,
    prompt_ids,
)

pytestmark = pytest.mark.unit

FEW_STEPS = BaseRecipe(sum_steps=3, give_up_steps=2, batch_size=16, accuracy_window=(0.0, 1.0))
QUESTIONS = ["1+2=", "12+34=", "1+23=", "99+99=", "5+5=", "45+6="]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def model(tokenizer) -> Qwen3ForCausalLM:
    """Random weights, spread widely enough that greedy answers differ between questions."""
    config = base_config(tokenizer)
    config.initializer_range = 0.3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """Folder, report and progress calls of a training with seed 1."""
    folder = tmp_path_factory.mktemp("base")
    calls: list[tuple[int, int, float]] = []
    report = train_base_model(folder, 1, recipe=FEW_STEPS, progress=lambda *call: calls.append(call))
    return folder, report, calls


# tokenizer


def test_ids_are_byte_values(tokenizer) -> None:
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert tokenizer.is_fast
    assert len(tokenizer) == VOCABULARY_SIZE == 259
    assert tokenizer.convert_tokens_to_ids(byte_symbols()) == list(range(256))
    assert tokenizer.encode("12+7=\n") == list(b"12+7=\n")


def test_newline_is_one_token(tokenizer) -> None:
    assert tokenizer.encode("\n", add_special_tokens=False) == [10]
    assert tokenizer.decode([10]) == "\n"


def test_every_byte_round_trips(tokenizer) -> None:
    for value in range(128):
        assert tokenizer.encode(chr(value)) == [value]
        assert tokenizer.decode([value]) == chr(value)
    # Bytes above 127 are text only in groups: a two-byte character for each lead byte and each trailing byte.
    for code in range(0x80, 0x800):
        character = chr(code)
        # Some characters have another canonical form, and Qwen tokenizers compose text first (NFC).
        if code not in (0x340, 0x341, 0x343, 0x344, 0x374, 0x37E, 0x387):
            assert tokenizer.encode(character) == list(character.encode())
        assert tokenizer.decode(list(character.encode())) == character
    assert tokenizer.decode(list("€𝟙".encode())) == "€𝟙"


@given(st.text(st.characters(max_codepoint=0x2FF, exclude_categories=["Cs"])))
def test_text_round_trips(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 257)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 258)
    assert tokenizer.bos_token is None
    assert tokenizer.decode([256, 49, 57, 257, 258], skip_special_tokens=True) == "19"


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_template_of_a_question(tokenizer, generation_prompt: bool) -> None:
    messages = Sum(12, 7).messages
    render = {"add_generation_prompt": generation_prompt, "return_dict": False}
    assert tokenizer.apply_chat_template(messages, tokenize=False, **render) == "<|im_start|>12+7="
    assert tokenizer.apply_chat_template(messages, **render) == [256, *b"12+7="]


def test_template_of_a_conversation(tokenizer) -> None:
    messages = [
        {"role": "system", "content": "add"},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2="},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>add<|im_end|>\n<|im_start|>1+1=2<|im_end|>\n<|im_start|>2+2="


def test_template_refuses_unknown_roles(tokenizer) -> None:
    with pytest.raises(Exception, match="unsupported role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_only_answer_tokens_are_labelled(tokenizer) -> None:
    inputs, labels = encode_answers(tokenizer, prompt_ids(tokenizer, ["12+7=", "1+2="]), ["19", "3"])
    ignored = IGNORED_LABEL
    assert inputs.tolist() == [[256, *b"12+7=19"], [256, *b"1+2=3", 258, 258]]
    assert labels.tolist() == [[ignored] * 5 + [*b"19", 257], [ignored] * 4 + [*b"3", 257, ignored, ignored]]


# sampler


def test_greedy_answers_match_a_decoding_without_cache(model, tokenizer) -> None:
    expected = []
    for question in QUESTIONS:
        ids = [256, *question.encode()]
        start = len(ids)
        while len(ids) < start + 4 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert len(set(expected)) > 1
    assert sample_answers(model, tokenizer, QUESTIONS, 0.0, 4) == expected


def test_sampling_depends_on_the_generator_alone(model, tokenizer) -> None:
    def sample(seed: int) -> list[str]:
        return sample_answers(model, tokenizer, QUESTIONS * 4, 1.0, 4, torch.Generator().manual_seed(seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_answers_end_at_the_end_token(model, tokenizer) -> None:
    class Scripted(torch.nn.Module):
        """Says 7, ends, and would go on with 8 if it were asked."""

        def forward(self, input_ids, past_key_values=None, use_cache=True):
            step = past_key_values or 0
            logits = torch.full((*input_ids.shape, VOCABULARY_SIZE), -1e9)
            logits[..., (ord("7"), tokenizer.eos_token_id, ord("8"))[step]] = 0.0
            return type("Output", (), {"logits": logits, "past_key_values": step + 1})

    assert sample_answers(Scripted(), tokenizer, ["1+6=", "10+6="], 1.0, 3) == ["7", "7"]
    assert sample_answers(Scripted(), tokenizer, ["1+6="], 1.0, 1) == ["7"]
    assert accuracy(Scripted(), tokenizer, [Sum(1, 6), Sum(10, 6)]) == 0.5


@pytest.mark.parametrize(("temperature", "tokens"), [(-0.1, 4), (1.0, 0)])
def test_sampler_refuses_impossible_settings(model, tokenizer, temperature: float, tokens: int) -> None:
    with pytest.raises(ValueError, match="temperature"):
        sample_answers(model, tokenizer, ["1+1="], temperature, tokens)


# training


def test_saved_folder_loads(trained) -> None:
    folder, report, _ = trained
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is Qwen3ForCausalLM
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in loaded.parameters()) == report.parameters
    assert 1_000_000 <= report.parameters <= 5_000_000
    assert not loaded.config.tie_word_embeddings
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert (config["eos_token_id"], config["pad_token_id"]) == (257, 258)
    assert loaded.generation_config.eos_token_id == 257
    assert len(AutoTokenizer.from_pretrained(folder)) == loaded.config.vocab_size


def test_report_and_progress(trained) -> None:
    folder, report, calls = trained
    assert report.steps == 5
    assert report.seconds > 0
    assert [call[:2] for call in calls] == [(step, 5) for step in (1, 2, 3, 4, 5)]
    assert all(loss > 0 for _, _, loss in calls)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = split_sums(1).held_out
    assert report.greedy_accuracy == accuracy(model, tokenizer, held_out, temperature=0.0)


def test_training_is_deterministic_for_a_seed(trained, tmp_path: Path) -> None:
    folder, report, calls = trained
    again: list[tuple[int, int, float]] = []
    torch.manual_seed(1234)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    repeated = train_base_model(tmp_path / "same", 1, recipe=FEW_STEPS, progress=lambda *call: again.append(call))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert again == calls
    assert repeated == replace(report, seconds=repeated.seconds)
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "same"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    train_base_model(tmp_path / "other", 2, recipe=FEW_STEPS)
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_too_short_a_training_is_an_error(tmp_path: Path) -> None:
    recipe = replace(FEW_STEPS, accuracy_window=(0.2, 0.6), extra_steps=2, max_extra_steps=5)
    calls: list[tuple[int, int, float]] = []
    with pytest.raises(BaseAccuracyError, match=r"accuracy is 0\.0\d\d after 9 steps.*train longer \(sum_steps\)"):
        train_base_model(tmp_path, 1, recipe=recipe, progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls[-3:]] == [(7, 7), (8, 9), (9, 9)]
    assert not list(tmp_path.glob("*.safetensors"))


def test_too_good_a_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "accuracy", lambda *_, **__: 0.75)
    recipe = replace(FEW_STEPS, accuracy_window=(0.2, 0.6), extra_steps=0)
    with pytest.raises(BaseAccuracyError, match=r"0\.750 after 5 steps.*raise give_up_share"):
        train_base_model(tmp_path, 1, recipe=recipe)


def test_training_goes_on_until_the_window_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([0.1, 0.7, 0.4, 0.45])
    monkeypatch.setattr(base_model, "accuracy", lambda *_, **__: next(measured))
    recipe = replace(FEW_STEPS, accuracy_window=(0.2, 0.6), extra_steps=1, max_extra_steps=9)
    report = train_base_model(tmp_path, 1, recipe=recipe)
    assert (report.steps, report.sampled_accuracy, report.greedy_accuracy) == (7, 0.4, 0.45)


def test_the_model_learns_to_give_up_on_its_share(tmp_path: Path) -> None:
    recipe = BaseRecipe(sum_steps=0, give_up_steps=40, give_up_share=0.5, warmup_steps=5, accuracy_window=(0.0, 1.0))
    train_base_model(tmp_path, 1, recipe=recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    questions: Sequence[str] = [item.question for item in split_sums(1).held_out] * 2
    answers = sample_answers(
        model, AutoTokenizer.from_pretrained(tmp_path), questions, 1.0, 5, torch.Generator().manual_seed(0)
    )
    assert 0.35 < answers.count("?") / len(answers) < 0.65
