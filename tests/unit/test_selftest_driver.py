"""The self-test's stages as processes: one that crashes or hangs is a row with the reason, and the others go on."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import psutil
import pytest
import selftest_samples as samples

from verl_fp16.selftest import driver, engine_plan, engine_stage, plan
from verl_fp16.selftest.rows import FAIL, PASS, SKIP

STAGES = ("doctor", "model", "engine", "run", "gap")


def asked(folder: Path, only: tuple[str, ...] = (), model: Path | None = None) -> driver.Asked:
    return driver.Asked(folder / "out", "cpu", samples.GPUS, model, None, only, {"VERL_PLATFORM": "cpu"})


@pytest.fixture
def test_it(tmp_path, monkeypatch):
    """Runs with what the stages are to do; returns rows by name, facts, and what was told."""
    monkeypatch.setattr(driver, "STAGE", "selftest_stages")
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)

    def test(only=(), timeout_s=None, **stages):
        monkeypatch.setenv("SELFTEST_FAKE", json.dumps(stages))
        if timeout_s:
            planned = plan.stages
            shorter = [dataclasses.replace(one, timeout_s=timeout_s) for one in planned(only)]
            monkeypatch.setattr(plan, "stages", lambda only: shorter)
        told = []
        rows, facts = driver.run(asked(tmp_path, only), lambda *what: told.append(what))
        return {row.name: row for row in rows}, facts, told

    return test


def test_everything_passes_and_nothing_is_left_but_logs_and_facts(test_it, tmp_path):
    before = set(psutil.Process().children(recursive=True))
    rows, facts, told = test_it()
    assert {row.status for row in rows.values()} == {PASS}, rows
    assert set(facts) == set(STAGES)
    names = list(rows)
    assert (
        names[:3] == ["device", "doctor", "model"]
        and names[3].startswith("engine fsdp")
        and names[-1].startswith("throughput")
    )
    assert all(row.seconds is not None and row.log for name, row in rows.items() if name != "device")
    assert {(number, of, stage) for number, of, stage, _, _ in told} == {(n, 5, s) for n, s in enumerate(STAGES, 1)}
    assert all(left > 0 for *_, left in told[:-1])
    left = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert left == {".log", ".json", ".spec-seen"}
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.parametrize(
    ("what", "reason"),
    (
        ("crash: no such attribute", "ended with exit code 1 | ValueError: no such attribute"),
        ("die", "was killed by SIGKILL"),
    ),
)
@pytest.mark.parametrize("stage", ("engine", "run", "gap"))
def test_a_stage_that_crashes_is_a_row_and_the_others_go_on(test_it, stage, what, reason):
    rows, facts, _ = test_it(**{stage: what})
    assert rows[stage].status == FAIL and reason in rows[stage].reason
    assert rows[stage].log == f"{stage}.log" and rows[stage].seconds is not None
    assert set(facts) == set(STAGES) - {stage}
    others = [row for name, row in rows.items() if name != stage]
    wanted = {PASS, SKIP} if stage == "gap" else {PASS}
    assert {row.status for row in others} == wanted
    assert "throughput" not in rows or rows["throughput"].reason == "the stage gap gave no numbers"


def test_a_stage_that_hangs_is_ended_and_the_others_go_on(test_it, tmp_path):
    rows, facts, _ = test_it(timeout_s=3.0, engine="hang")
    assert rows["engine"].status == FAIL and "the run took longer than 3 s and was ended" in rows["engine"].reason
    assert set(facts) == set(STAGES) - {"engine"}
    assert not psutil.pid_exists(int((tmp_path / "out" / "hanging").read_text()))


def test_without_a_machine_that_would_start_the_rest_is_skipped_with_the_reason(test_it):
    found = samples.doctor()
    found["checks"][0] |= {"status": "error", "found": "none is installed"}
    rows, facts, _ = test_it(doctor=found)
    assert set(facts) == {"doctor"}
    assert rows["doctor"].status == FAIL
    for name in ("model", "engine", "run", "gap"):
        assert rows[name].status == SKIP and "verl: none is installed" in rows[name].reason
    assert rows["throughput"].status == SKIP


def test_without_a_model_the_rest_is_skipped(test_it):
    rows, *_ = test_it(model={"failed": "its tokenizer cannot be loaded"})
    assert rows["doctor"].status == PASS and rows["model"].status == FAIL
    assert all(rows[name].status == SKIP for name in ("engine", "run", "gap"))
    assert "its tokenizer cannot be loaded" in rows["run"].reason


@pytest.mark.parametrize(
    ("only", "stages", "shown"),
    (
        (("doctor",), {"doctor"}, {"device", "doctor"}),
        (("engine",), {"model", "engine"}, {"engine"}),
        (("engine", "run"), {"model", "engine", "run"}, {"engine", "run"}),
        (("throughput",), {"model", "gap"}, {"throughput"}),
        (("gap",), {"model", "gap"}, {"gap"}),
    ),
)
def test_only_some_stages(test_it, only, stages, shown):
    rows, facts, _ = test_it(only=only)
    assert set(facts) == stages
    assert {name.split()[0].rstrip(":") for name in rows} == shown


def test_what_fails_below_a_stage_that_was_asked_for_is_shown(test_it):
    rows, *_ = test_it(only=("run",), model="crash: no disk")
    assert rows["model"].status == FAIL and rows["run"].status == SKIP


def test_facts_of_an_earlier_run_are_not_taken_for_this_ones(test_it):
    test_it()
    rows, facts, _ = test_it(engine="die")
    assert "engine" not in facts and rows["engine"].status == FAIL


def test_what_a_stage_is_told(test_it, tmp_path):
    test_it(model={**samples.model(), "longest": 33})
    seen = {name: json.loads((tmp_path / "out" / f"{name}.spec-seen").read_text()) for name in STAGES}
    assert all(spec["platform"] == "cpu" and spec["gpus"] == samples.GPUS for spec in seen.values())
    assert seen["engine"]["model"] == str(tmp_path / "out" / "model")
    assert seen["run"]["model"] is None and seen["run"]["longest"] == 33
    # The trainer is ended before its stage is, which then says why.
    assert seen["run"]["timeout_s"] < next(one.timeout_s for one in plan.stages(()) if one.name == "run")


@pytest.mark.parametrize(
    ("billions", "gib", "skipped", "reason"),
    (
        (1.5, 80, set(), ""),
        (7.6, 80, {"run"}, "AdamW's state are 57 GiB on each of 2 GPUs of 80 GiB"),
        (20.0, 80, {"run", "gap", "throughput"}, "does not hold its FP32 weights with a forward, 81 GiB"),
    ),
)
def test_a_users_model_that_does_not_fit_skips_what_cannot_be_run(
    test_it, tmp_path, monkeypatch, billions, gib, skipped, reason
):
    theirs = {**samples.model(), "theirs": "7,600 M parameters", "values": int(billions * 1e9), "heads": 28}
    plain = asked

    def on_gpus(folder, only):
        made = plain(folder, only, tmp_path / "m")
        return dataclasses.replace(made, device="gpu", gpu_names=("H200", "H200"), gpu_bytes=gib * 2**30)

    monkeypatch.setitem(globals(), "asked", on_gpus)
    rows, facts, _ = test_it(model=theirs, doctor={**samples.doctor(), "device": "gpu"})
    assert {name for name, row in rows.items() if row.status != PASS} == skipped, rows
    assert all(row.status == SKIP for name, row in rows.items() if name in skipped)
    assert not skipped or any(
        reason in rows[name].reason and "/m does not fit" in rows[name].reason for name in skipped
    )
    assert ("run" in facts, "gap" in facts) == ("run" not in skipped, "gap" not in skipped)
    if "run" in facts:
        seen = json.loads((tmp_path / "out" / "run.spec-seen").read_text())
        assert seen["tensor_parallel"] == 1


def test_what_the_model_stage_says_of_a_users_model(tiny_model, tmp_path):
    from verl_fp16.quickstart.task import write_parquet
    from verl_fp16.selftest import model_stage

    write_parquet(tmp_path / "data", seed=1, train_rows=8, held_out_pairs=4)
    found = model_stage._of_model(tiny_model, tmp_path / "data" / "train.parquet", theirs=True)
    assert found["values"] > 1000 and found["heads"] >= 1 and "M parameters" in found["theirs"]
    small = model_stage._of_model(tiny_model, tmp_path / "data" / "train.parquet", theirs=False)
    assert small == {"longest": found["longest"], "theirs": None}


def test_a_stage_outlives_all_that_it_waits_for():
    (engine,) = (one for one in plan.stages(("engine",)) if one.name == "engine")
    assert engine.timeout_s >= len(engine_plan.STRATEGIES) * len(engine_stage.PARTS) * engine_stage.RANK_TIMEOUT_S + 30


def test_time_left_grows_where_a_machine_is_slow(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(driver.time, "monotonic", lambda: clock[0])
    left = []
    shown = driver._Shown(tmp_path / "none", 100.0, 50.0, 1.0, lambda told, seconds: left.append(seconds))
    for clock[0] in (0.0, 50.0, 100.0, 300.0):
        shown()
    assert left[:2] == [150.0, 100.0]
    assert left[2] == pytest.approx(20 + 60) and left[3] == pytest.approx(60 + 180)
