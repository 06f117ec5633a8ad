"""The wraps on a checkpoint's saving around a fake of verl's; with verl's engine they are in the engine tier."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from verl_fp16.export import MARK, ExportError, WeightOverflow
from verl_fp16.hooks import export


class FakeVerl:
    """An engine and a checkpoint manager whose functions are wrapped, in verl's order of calls."""

    def __init__(self, weights: dict, *, payload: dict | None = None, wrapped_gathering: bool = True):
        self.weights, self.seen = weights, []
        mixed_precision = {"verl_fp16": payload} if payload is not None else {}
        gather = (lambda original: original) if not wrapped_gathering else export.gather_in_declared_dtype
        self.gather = gather(lambda: self.weights)
        save_of_manager = export.keep_checkpoint_without_export(type(self).save_of_manager)
        self.engine = SimpleNamespace(
            engine_config=SimpleNamespace(mixed_precision=mixed_precision),
            checkpoint_manager=SimpleNamespace(should_save_hf_model=True),
        )

        def save_of_engine(engine, local_path, *args, **kwargs):
            save_of_manager(self, local_path)
            self.seen.append("engine done")

        self.save = export.export_in_declared_dtype(save_of_engine)

    def save_of_manager(self, local_path):
        if local_path is None:
            self.seen.append("nothing to do")
            return
        (local_path / "huggingface").mkdir()
        (local_path / "huggingface" / "config.json").write_text('{"dtype": "float32"}')
        self.seen.append({name: weight.dtype for name, weight in self.gather().items()})


FP16 = {"role": "actor", "dtype": "float16"}


def test_what_was_gathered_is_saved_in_the_declared_dtype(tmp_path):
    verl = FakeVerl({"w": torch.ones(2)}, payload=FP16)
    verl.save(verl.engine, tmp_path)
    assert verl.seen == [{"w": torch.float16}, "engine done"]
    assert json.loads((tmp_path / "huggingface" / "config.json").read_text()) == {"dtype": "float16"}
    assert (tmp_path / MARK).exists()


@pytest.mark.parametrize("payload", (None, {**FP16, "dtype": "bfloat16"}))
def test_without_the_flag_and_in_bfloat16_all_is_verls(tmp_path, payload):
    verl = FakeVerl({"w": torch.ones(2)}, payload=payload)
    verl.save(verl.engine, tmp_path)
    assert verl.seen == [{"w": torch.float32}, "engine done"]
    assert json.loads((tmp_path / "huggingface" / "config.json").read_text()) == {"dtype": "float32"}
    assert not (tmp_path / MARK).exists()


def test_verl_that_saves_nowhere_is_left_alone():
    verl = FakeVerl({}, payload=FP16)
    verl.save(verl.engine, None)
    assert verl.seen == ["nothing to do", "engine done"]


@pytest.mark.parametrize(
    ("weight", "error", "said"),
    (
        (torch.tensor([1e6]), WeightOverflow, "w .1 of 1, largest magnitude 1e.06.*verl_fp16.sync.on_overflow"),
        (torch.zeros(1, dtype=torch.float8_e4m3fn), ExportError, "ValueError: w is torch.float8_e4m3fn"),
    ),
)
def test_a_failed_cast_is_raised_when_all_else_is_done(tmp_path, weight, error, said):
    verl = FakeVerl({"w": weight}, payload=FP16)
    with pytest.raises(error, match=f"actor, {tmp_path}: nothing was written for hf_model: .*{said}"):
        verl.save(verl.engine, tmp_path)
    assert verl.seen == ["engine done"]
    assert (tmp_path / MARK).exists()


def test_weights_that_went_another_way_are_an_error(tmp_path):
    """As where verl's checkpoint manager was imported before the hooks were put in place."""
    verl = FakeVerl({"w": torch.ones(2)}, payload=FP16, wrapped_gathering=False)
    with pytest.raises(ExportError, match="did not pass through verl_fp16's hook"):
        verl.save(verl.engine, tmp_path)
    assert not (tmp_path / MARK).exists()


def test_verls_own_error_passes_and_leaves_nothing_behind(tmp_path):
    verl = FakeVerl({"w": torch.ones(2)}, payload=FP16)
    (tmp_path / "huggingface").mkdir()
    with pytest.raises(FileExistsError):
        verl.save(verl.engine, tmp_path)
    assert verl.gather()["w"].dtype == torch.float32, "outside of a save nothing is cast"
    assert not (tmp_path / MARK).exists()
