"""`python -m verl_fp16.quickstart.make`: what the CPU recipes train on."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from verl_fp16.quickstart import base_model, make
from verl_fp16.quickstart.base_model import BaseRecipe


@pytest.fixture
def few_steps(monkeypatch):
    """Trains for three steps, to any accuracy."""
    train = base_model.train_base_model

    def short(folder, seed, *, recipe, progress):
        few = BaseRecipe(sum_steps=2, give_up_steps=1, batch_size=8, accuracy_window=(0.0, 1.0), experts=recipe.experts)
        return train(folder, seed, recipe=few, progress=progress)

    monkeypatch.setattr(base_model, "train_base_model", short)


@pytest.mark.parametrize(
    ("options", "name", "kind"), (((), "model", "qwen3"), (("--experts",), "model-moe", "qwen3_moe"))
)
def test_it_makes_what_the_recipes_name(options, name, kind, few_steps, tmp_path, capsys):
    assert make.main([str(tmp_path), *options]) == 0
    config = AutoConfig.from_pretrained(tmp_path / name)
    assert config.model_type == kind
    assert (tmp_path / name / "model.safetensors").is_file() and (tmp_path / name / "tokenizer.json").is_file()
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"train.parquet", "validation.parquet"}
    assert str(tmp_path / name) in capsys.readouterr().out
    if options:
        assert (config.num_experts, config.num_experts_per_tok) == (make.EXPERTS, 2)
        assert config.moe_intermediate_size % 32 == 0, "vLLM's CPU build would pad it"


def test_a_folder_that_cannot_be_made_is_told(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert make.main([str(tmp_path / "file" / "sub")]) == 2
    assert f"{tmp_path / 'file' / 'sub'}: Not a directory" in capsys.readouterr().err


def test_a_model_that_did_not_learn_is_told(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise base_model.BaseAccuracyError("too low")

    monkeypatch.setattr(base_model, "train_base_model", fail)
    assert make.main([str(tmp_path)]) == 1
    assert "too low" in capsys.readouterr().err


def test_a_seed_out_of_range_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        make.main([str(tmp_path), "--seed", "-1"])
    assert ended.value.code == 2
    assert "--seed" in capsys.readouterr().err
