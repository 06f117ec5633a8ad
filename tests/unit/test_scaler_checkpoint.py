"""The loss scaler's side file: written whole, read exactly, refused by name. Several ranks are in the engine tier."""

from __future__ import annotations

import json

import pytest

from verl_fp16.loss_scale_settings import LossScaleSettings
from verl_fp16.loss_scaling import LossScaler, LossScaleStateError
from verl_fp16.scaler_checkpoint import load_scaler, save_scaler, state_file


def scaler(**settings) -> LossScaler:
    return LossScaler(LossScaleSettings(**settings), "cpu")


def test_a_state_comes_back_to_the_bit_and_is_told(tmp_path, capsys):
    saved = scaler(init=1000.0 / 3.0)
    saved.growth_tracker = 7
    assert save_scaler(saved, tmp_path) == state_file(tmp_path, 0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["loss_scale_world_size_1_rank_0.json"]
    loaded = scaler()
    load_scaler(loaded, tmp_path)
    assert loaded.state_dict() == saved.state_dict()
    told = capsys.readouterr().err
    assert told == f"verl_fp16: loss scale 333.333 from {tmp_path}, after 7 of 400 updates until it grows\n"


def test_without_a_state_it_says_why_and_goes_on(tmp_path, capsys):
    loaded = scaler(init=64.0)
    load_scaler(loaded, tmp_path)
    load_scaler(loaded, "hdfs://cluster/run")
    assert loaded.scale_value == 64.0
    plain, remote = capsys.readouterr().err.splitlines()
    assert "is not there, as plain verl saves none: it goes on from 64" in plain
    assert "hdfs://cluster/run is not read from there" in remote


def test_what_the_settings_change_of_a_state_is_told(tmp_path, capsys):
    save_scaler(scaler(), tmp_path)
    load_scaler(scaler(init=8.0, max=1024.0), tmp_path)
    assert "verl_fp16: the saved loss scale 65536 became 1024" in capsys.readouterr().err


@pytest.mark.parametrize("content", ("", "{", "null", "[]", "3", json.dumps({"format": 9}), '{"format": 1}'))
def test_a_broken_state_names_its_place_and_the_way_out(tmp_path, content):
    state_file(tmp_path, 0, 1).write_text(content)
    loaded = scaler(init=64.0)
    with pytest.raises(LossScaleStateError) as refused:
        load_scaler(loaded, tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "remove loss_scale_*.json of all ranks" in str(refused.value)
    assert loaded.scale_value == 64.0
