"""Exports without verl: the cast of a state dict, the tag in config.json, the mark beside the shards."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

from verl_fp16.export import (
    MARK,
    Export,
    ExportError,
    InDtype,
    KeepPrecision,
    WeightOverflow,
    read_mark,
    read_tag,
    write_mark,
    write_tag,
)

FP16 = Export("float16")


def payload(trained: str, **sync) -> dict:
    return {"role": "actor", "dtype": trained, **({"weight_sync": sync} if sync else {})}


@pytest.mark.parametrize(
    ("settings", "export"),
    (
        (payload("float16"), Export("float16", "error")),
        (payload("bfloat16"), None),
        (payload("float16", dtype="float16", on_overflow="clamp", audit_interval=50), Export("float16", "clamp")),
        (payload("bfloat16", dtype="float16", on_overflow="ignore"), Export("float16", "ignore")),
        (payload("bfloat16", dtype="float32", on_overflow="error"), Export("float32", "error")),
        (payload("bfloat16", dtype="bfloat16", on_overflow="error"), None),
    ),
)
def test_the_dtype_of_the_weight_sync_is_exported_and_bfloat16_is_left_to_verl(settings, export):
    assert Export.of_role(settings) == export


def test_images_are_rounded_to_nearest_even_and_take_their_places():
    torch.manual_seed(0)
    state = {"weight": torch.randn(300, 70), "steps": torch.tensor(3), "extra": {"not": "a tensor"}}
    state["odd"] = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 2**-25, -(2**-24), 65519.0])
    before = dict(state)
    assert FP16.cast(state) == ""
    assert list(state) == list(before)
    for name in ("weight", "odd"):
        assert state[name].dtype == torch.float16
        assert torch.equal(state[name], before[name].to(torch.float16))
        assert before[name].dtype == torch.float32, "the masters are as they were"
    assert state["odd"].tolist() == [1.0, 1 + 2**-9, 0.0, -(2**-24), 65504.0]
    assert state["steps"] is before["steps"] and state["extra"] is before["extra"]


def test_float32_is_declared_too():
    state = {"weight": torch.randn(5)}
    before = state["weight"]
    Export("float32").cast(state)
    assert state["weight"] is before


def test_tied_weights_stay_tied():
    weight = torch.randn(4, 4)
    state = {"embed": weight, "head": weight, "view": weight.view(16), "empty": torch.empty(0)}
    FP16.cast(state)
    assert state["embed"] is state["head"]
    assert state["view"].shape == (16,)


def test_each_tensor_is_let_go_before_the_next_is_cast():
    alive = []

    class Watched(dict):
        def __setitem__(self, name, image):
            super().__setitem__(name, image)
            alive.append(sum(source() is not None for source in sources))

    watched = Watched({str(number): torch.randn(8) for number in range(3)})
    sources = [weakref.ref(tensor) for tensor in watched.values()]
    FP16.cast(watched)
    assert alive == [3, 2, 1], "the one at hand, and those to come"


PLANTED = {"layer.0.weight": [1.0, 70000.0, -1e30], "layer.1.weight": [65520.0], "fine": [65519.0]}


def planted() -> dict:
    return {name: torch.tensor(values) for name, values in PLANTED.items()}


def test_what_overflows_is_an_error_that_names_it():
    with pytest.raises(WeightOverflow) as caught:
        FP16.cast(planted())
    said = str(caught.value)
    assert "3 weights are beyond the range of float16 (65504), in 2 tensors" in said
    assert "layer.0.weight" in said and "layer.1.weight" in said and "fine" not in said
    assert "1e+30" in said and "65520" in said


@pytest.mark.parametrize(("policy", "largest"), (("clamp", 65504.0), ("ignore", torch.inf)))
def test_what_overflows_is_told_where_it_is_no_error(policy, largest):
    state = planted()
    told = Export("float16", policy).cast(state)
    assert state["layer.0.weight"].tolist() == [1.0, largest, -largest]
    assert state["layer.1.weight"].tolist() == [largest]
    assert told.startswith("3 weights beyond the range of float16 became ")
    assert told.endswith(f"(on_overflow={policy}): layer.0.weight, layer.1.weight")


@pytest.mark.parametrize("policy", ("error", "clamp"))
def test_weights_that_were_not_finite_are_an_error(policy):
    with pytest.raises(WeightOverflow, match="1 weight is inf or nan, in 1 tensor: gone"):
        Export("float16", policy).cast({"gone": torch.tensor([1.0, torch.nan])})


def test_a_mark_comes_back(tmp_path):
    assert read_mark(tmp_path) is None
    write_mark(tmp_path, Export("float16", "clamp"))
    assert [path.name for path in tmp_path.iterdir()] == [MARK]
    assert json.loads((tmp_path / MARK).read_text()) == {"dtype": "float16", "on_overflow": "clamp"}
    assert read_mark(tmp_path) == Export("float16", "clamp")


@pytest.mark.parametrize(
    "text",
    (
        "",
        "{",
        "[]",
        "null",
        '{"on_overflow": "error"}',
        '{"dtype": "float17"}',
        '{"dtype": ["float16"]}',
        '{"dtype": "bfloat16"}',
        '{"dtype": "float16", "on_overflow": "shrug"}',
        '{"dtype": "float16", "more": 1}',
    ),
)
def test_a_broken_mark_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / MARK).write_text(text)
    with pytest.raises(ExportError) as caught:
        read_mark(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / MARK} cannot be read: ")
    assert '{"dtype": "float16", "on_overflow": "error"}' in said and "remove it" in said


def config(folder, **values) -> dict:
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return values


@pytest.mark.parametrize("key", ("dtype", "torch_dtype"))
@pytest.mark.parametrize("before", ("bfloat16", "float32", None))
def test_the_tag_is_changed_under_the_name_it_has_and_nothing_else_is(tmp_path, key, before):
    values = config(tmp_path, **{key: before}, architectures=["Q"], eos_token_id=3, rope={"theta": 1e6}, name="größer")
    before_text = (tmp_path / "config.json").read_text()
    assert read_tag(tmp_path) == before
    write_tag(tmp_path, "float16")
    assert read_tag(tmp_path) == "float16"
    written = json.dumps(before)
    assert (tmp_path / "config.json").read_text() == before_text.replace(f'"{key}": {written}', f'"{key}": "float16"')
    assert json.loads((tmp_path / "config.json").read_text()) == {**values, key: "float16"}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_config_without_a_tag_gets_the_one_that_every_transformers_reads(tmp_path):
    config(tmp_path, architectures=["Q"])
    assert read_tag(tmp_path) is None
    write_tag(tmp_path, "float16")
    from transformers import PretrainedConfig

    assert PretrainedConfig.from_pretrained(tmp_path).dtype == torch.float16


def test_the_parts_of_a_model_are_tagged_with_it(tmp_path):
    config(
        tmp_path,
        dtype="bfloat16",
        text_config={"dtype": "bfloat16", "hidden_size": 8},
        vision_config={"torch_dtype": "float32"},
        audio_config={"hidden_size": 8},
        vocabulary_map={"dtype": 17},
        quantization_config={"dtype": "bfloat16"},
        odd_config={"dtype": 17},
    )
    write_tag(tmp_path, "float16")
    found = json.loads((tmp_path / "config.json").read_text())
    assert found == {
        "dtype": "float16",
        "text_config": {"dtype": "float16", "hidden_size": 8},
        "vision_config": {"torch_dtype": "float16"},
        "audio_config": {"hidden_size": 8},
        "vocabulary_map": {"dtype": 17},
        "quantization_config": {"dtype": "bfloat16"},
        "odd_config": {"dtype": 17},
    }


def test_rounding_to_bfloat16_is_left_out_inside_and_nothing_else_is():
    weight = torch.randn(4, 4)
    with KeepPrecision():
        assert weight.bfloat16() is weight
        assert weight.t().bfloat16().dtype == torch.float32
        assert weight.half().dtype == weight.to(torch.float16).dtype == torch.float16
        assert weight.to(torch.bfloat16).dtype == torch.bfloat16
        assert torch.cat([weight, weight], dim=0).shape == (8, 4)
    assert weight.bfloat16().dtype == torch.bfloat16


def test_a_class_makes_models_in_the_dtype_whatever_it_is_asked_for():
    class Auto:
        other = 7

        @classmethod
        def from_config(cls, *args, **kwargs):
            return "config", args, kwargs

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            return "pretrained", args, kwargs

    made = InDtype(Auto, torch.float16)
    asked = {"torch_dtype": torch.bfloat16, "trust_remote_code": True}
    given = {"torch_dtype": torch.float16, "trust_remote_code": True}
    assert made.from_config("c", **asked) == ("config", ("c",), given)
    assert made.from_pretrained("p", **asked) == ("pretrained", ("p",), given)
    assert made.other == 7
