"""The gap of a step on the driver: measured where verl compares, named, watched, and left on disk."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from verl_fp16 import plugin
from verl_fp16.hooks import gap_watch, mismatch
from verl_fp16.hooks.gap_watch import FOLDER, watch_gap
from verl_fp16.mismatch.measured import MeasuredGap
from verl_fp16.readback.compare import Answer, dtypes_in_force
from verl_fp16.settings import Settings
from verl_fp16.training_step import StepRecord

THEIRS = {"training/rollout_probs_diff_mean": 0.1}
GAP = "mismatch/log_prob_abs_diff_mean"


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    monkeypatch.setattr(plugin, "flag_given", True)
    monkeypatch.setattr(mismatch, "watched", True)
    mismatch.take_seen()


def make_batch(gap=0.5, bad=None, **more):
    rollout = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -3.0, -0.5]])
    training = rollout - torch.tensor([[gap, 0.0, 7.0], [0.0, gap, 0.0]])
    if bad is not None:
        rollout[1, 1] = bad
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    tokens = torch.tensor([[5, 6, 0], [7, 8, 9]])
    batch = {"rollout_log_probs": rollout, "old_log_probs": training, "response_mask": mask, "responses": tokens}
    return SimpleNamespace(batch=batch, non_tensor_batch={}, **more)


measure = mismatch.add_log_prob_gap(lambda data: dict(THEIRS))


class Trainer:
    def __init__(self, folder, **settings):
        self.config = OmegaConf.create(
            {"verl_fp16": {"mismatch": settings}, "trainer": {"default_local_dir": str(folder)}}
        )
        self.tokenizer = SimpleNamespace(decode=lambda ids: "".join(f"<{number}>" for number in ids))
        self.saved = []
        self._verl_fp16_read_back = [
            Answer("trainer"),
            Answer("w", ("actor",), {"roles": {"actor": {"autocast": "float16"}}}),
            Answer("r", ("rollout",), {"roles": {"rollout": {"model_dtype": "bfloat16"}}}),
        ]


def log_step(trainer, number=1, data=None, **metrics):
    """One step as the trainers do it: compare, count, log."""
    step = StepRecord(number, {"training/global_step": number, **metrics}, trainer)
    if data is not None:
        step.metrics.update(measure(data))
    watch_gap(step)
    return step


def test_the_gap_is_added_to_what_verl_logs_only_with_the_flag(monkeypatch):
    metrics = measure(make_batch())
    assert metrics[GAP] == pytest.approx(1 / 5), "the padding token does not count"
    assert metrics | THEIRS == metrics and metrics["mismatch/tokens"] == 5
    monkeypatch.setattr(plugin, "flag_given", False)
    mismatch.take_seen()
    assert measure(make_batch()) == THEIRS
    assert mismatch.take_seen().gap is None


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_token_that_is_not_finite_is_counted_and_spoils_no_other_number(bad):
    metrics = measure(make_batch(bad=bad))
    assert metrics["mismatch/nonfinite_rollout"] == 1 and metrics["mismatch/tokens"] == 4
    assert all(math.isfinite(value) for value in metrics.values())


def test_without_a_response_mask_the_end_of_the_attention_mask_is_taken():
    data = make_batch()
    data.batch["attention_mask"] = torch.cat([torch.ones(2, 4), data.batch.pop("response_mask")], dim=1)
    assert measure(data)["mismatch/tokens"] == 5


def test_samples_are_named_by_the_v1_trainers_keys_or_the_legacy_ones_uid():
    def compare(self, batch, metrics):
        metrics.update(measure(make_batch()))
        return "result"

    batch = SimpleNamespace(keys=["a_0", "b_0"])
    assert mismatch.remember_sample_ids(compare)(None, batch, {}) == "result"
    assert mismatch.take_seen().gap.ids == ["a_0", "b_0"]
    measure(make_batch())
    assert mismatch.take_seen().gap.ids is None, "of another batch"
    data = make_batch()
    data.non_tensor_batch["uid"] = ["u", "v"]
    measure(data)
    assert mismatch.take_seen().gap.ids == ["u", "v"]


def test_the_dtypes_it_was_measured_under_are_those_that_were_read_back(tmp_path):
    step = log_step(Trainer(tmp_path), data=make_batch())
    dtypes = {name: value for name, value in step.metrics.items() if "_dtype/" in name}
    assert dtypes == {"mismatch/train_dtype/float16": 1.0, "mismatch/rollout_dtype/bfloat16": 1.0}
    assert dtypes_in_force([]) == {}
    assert 0 < step.metrics["mismatch/seconds"] < 10


def test_a_step_without_a_gap_is_logged_as_it_is(tmp_path):
    step = log_step(Trainer(tmp_path, evidence_interval=1))
    assert step.metrics == {"training/global_step": 1}
    assert not (tmp_path / FOLDER).exists()


def test_what_the_engine_measured_is_logged_without_the_role(tmp_path):
    step = log_step(Trainer(tmp_path), **{"actor/mismatch_first_update/k3": 1e-6, "actor/loss": 1.0})
    assert step.metrics["mismatch_first_update/k3"] == 1e-6 and step.metrics["actor/loss"] == 1.0
    assert not [name for name in step.metrics if name.startswith("actor/mismatch")]


def test_evidence_is_written_at_the_interval_and_read_by_the_command(tmp_path):
    from typer.testing import CliRunner

    from verl_fp16.cli.app import app

    trainer = Trainer(tmp_path, evidence_interval=2, evidence_tokens=3)
    for number in (1, 2, 3):
        log_step(trainer, number, make_batch())
    (folder,) = (tmp_path / FOLDER).iterdir()
    assert folder.name == "step_000002"
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["dtypes"] == {"train": ["float16"], "rollout": ["bfloat16"]}
    assert facts["scalars"][GAP] == pytest.approx(0.2)
    shown = CliRunner().invoke(app, ["tokens", str(tmp_path), "--json"])
    assert shown.exit_code == 0, shown.output
    assert {row["token_id"] for row in json.loads(shown.output)["tokens"][:2]} == {5, 8}


def test_an_alarm_is_told_and_leaves_evidence(tmp_path, capsys):
    step = log_step(Trainer(tmp_path, evidence_interval=0), data=make_batch(bad=math.nan))
    assert step.metrics["mismatch/alarms"] == 1
    told = capsys.readouterr()
    assert "mismatch/nonfinite_rollout is 1" in told.out + told.err
    assert f"verl-fp16 tokens {tmp_path}" in told.out + told.err
    (folder,) = (tmp_path / FOLDER).iterdir()
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["alarm"] is True and "nonfinite_rollout" in facts["alarms"][0]
    assert not step.checkpoint_wanted and not step.stopped_by


@pytest.mark.parametrize("on_alarm, saves, stops", [("warn", False, 0), ("checkpoint", True, 0), ("stop", True, 1)])
def test_what_an_alarm_does_is_set(tmp_path, on_alarm, saves, stops):
    step = log_step(Trainer(tmp_path, on_alarm=on_alarm), data=make_batch(bad=math.nan))
    assert (step.checkpoint_wanted, len(step.stopped_by)) == (saves, stops)
    quiet = log_step(Trainer(tmp_path, on_alarm=on_alarm), data=make_batch(gap=1e-3))
    assert (quiet.checkpoint_wanted, quiet.stopped_by, quiet.metrics["mismatch/alarms"]) == (False, [], 0)


def test_evidence_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "verl_fp16").write_text("a file where a folder should be")
    trainer = Trainer(tmp_path, evidence_interval=1)
    for number in (1, 2):
        log_step(trainer, number, make_batch())
    told = capsys.readouterr()
    assert (told.out + told.err).count("no evidence of the mismatch under") == 1


def test_stuck_responses_are_counted_and_an_alarm(tmp_path, capsys):
    trainer = Trainer(tmp_path, alarm_run_tokens=4, evidence_interval=0)
    tokens = torch.tensor([[0, 0, 0, 0, 0], [1, 2, 3, 3, 3], [3, 3, 3, 3, 3]])
    mask = (torch.arange(5) < torch.tensor([[5], [5], [2]])).long()  # the last row's run is of a tool
    batch = {"responses": tokens, "response_mask": mask}
    counted = mismatch.remember_responses(lambda batch, use_critic=True: {"theirs": use_critic})
    for number in (1, 2):
        assert counted(SimpleNamespace(batch=batch), use_critic=False) == {"theirs": False}
        step = log_step(trainer, number)
        assert step.metrics["mismatch/repeating_rows_share"] == pytest.approx(1 / 3)
    assert step.metrics["mismatch/alarms"] == 1
    assert "repeating_rows_share" in "".join(capsys.readouterr())


def test_a_batch_that_fills_memory_is_let_go_with_its_step(tmp_path):
    import weakref

    log_step(trainer := Trainer(tmp_path, evidence_interval=1), data=(data := make_batch()))
    held = weakref.ref(data.batch["rollout_log_probs"])
    del data
    assert held() is None and mismatch.take_seen() == mismatch.Seen()
    assert trainer._verl_fp16_gap_watch is not None


def test_in_bypass_mode_evidence_is_asked_of_the_ranks(tmp_path, monkeypatch):
    from verl_fp16.readback import gather

    batch = make_batch().batch
    tensors = [batch[name] for name in ("rollout_log_probs", "old_log_probs", "response_mask", "responses")]
    parts = [MeasuredGap.of(*tensors).evidence(3, 10, rank=rank) for rank in (0, 1)]
    answers = [Answer(f"w{rank}", ("actor",), part) for rank, part in enumerate(parts)]
    monkeypatch.setattr(gather, "training_questions", lambda trainer: [])
    monkeypatch.setattr(gather, "ask", lambda questions, timeout_s: [*answers, Answer("w2", failure="it is gone")])
    log_step(Trainer(tmp_path, evidence_interval=1), **{"actor/mismatch_first_update/k3": 1e-6})
    (folder,) = (tmp_path / FOLDER).iterdir()
    assert json.loads((folder / "facts.json").read_text())["tokens_seen"] == 10


def test_defaults_are_those_of_the_settings():
    assert gap_watch.read_settings(OmegaConf.create({"verl_fp16": {}})).mismatch == Settings().mismatch


def test_a_step_with_several_updates_is_measured_as_a_whole(tmp_path):
    """verl averages what its trainers log over the updates of such a step."""
    trainer, bad = Trainer(tmp_path, evidence_interval=0), make_batch(bad=math.nan)
    measure(bad)
    step = StepRecord(1, {**measure(make_batch()), "mismatch/nonfinite_rollout": 0.5, "mismatch/tokens": 4.5}, trainer)
    watch_gap(step)
    assert (step.metrics["mismatch/nonfinite_rollout"], step.metrics["mismatch/tokens"]) == (1, 9)
    assert step.metrics["mismatch/alarms"] == 1


def test_nothing_is_held_where_nobody_takes_it(monkeypatch):
    monkeypatch.setattr(mismatch, "watched", False)
    assert GAP in measure(make_batch())
    mismatch.remember_responses(lambda batch: {})(make_batch())
    assert mismatch.take_seen() == mismatch.Seen()


def test_a_tokenizer_that_raises_anything_ends_no_run(tmp_path, capsys):
    trainer = Trainer(tmp_path, evidence_interval=1)

    def decode(ids):
        raise RuntimeError("no such token")

    trainer.tokenizer.decode = decode
    assert log_step(trainer, data=make_batch()).metrics["mismatch/tokens"] == 5
    assert "RuntimeError: no such token" in capsys.readouterr().err


def test_ids_of_another_number_of_samples_are_none():
    data = make_batch()
    data.non_tensor_batch["uid"] = ["only one"]
    measure(data)
    assert mismatch.take_seen().gap.ids is None


def test_without_any_mask_all_tokens_count_as_in_verl():
    data = make_batch()
    del data.batch["response_mask"]
    assert measure(data)["mismatch/tokens"] == 6
