"""The command mismatch with both sides faked: its numbers, and what goes on after a stop."""

from __future__ import annotations

import math
import os
from pathlib import Path

import gap_fakes
import numpy as np
import pyarrow.parquet as pq
import pytest
from gap_command import OPTIONS, PROMPTS, mismatch, read, refused
from gap_fakes import FakeSampler, FakeTrainingSide

from verl_fp16.gap_report import folder, stage


def test_the_numbers_are_those_of_the_tokens(faked, tmp_path):
    result = mismatch(faked, *OPTIONS)
    assert result.exit_code == 0, result.output
    found = read()["measurements"]
    rows = pq.read_table(tmp_path / "out" / "sequences.parquet").to_pylist()
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        mine = [row for row in rows if row["measurement"] == name]
        assert [row["sample"] for row in mine] == list(range(PROMPTS * 20))
        sides = {}
        for part in folder.parts(tmp_path / "out" / "tokens" / name):
            columns = folder.read_part(part)
            for sample, answer in zip(columns["sample"], columns["answer"], strict=True):
                sides[sample] = [gap_fakes.log_prob(answer, dtype, salt).astype(float) for salt in (1, 2)]
        for row in mine:
            mu, pi = sides[row["sample"]]
            assert row["length"] == len(mu)
            assert row["log_ratio"] == pytest.approx(math.fsum(pi - mu), abs=1e-12)
            assert row["abs_sum"] == pytest.approx(math.fsum(abs(mu - pi)), abs=1e-12)
            assert row["k3_sum"] == pytest.approx(math.fsum(np.expm1(pi - mu) + mu - pi), rel=1e-9, abs=1e-12)
        d = np.concatenate([mu - pi for mu, pi in sides.values()])
        values = found[name]["intervals"]
        assert found[name]["tokens"] == len(d)
        assert values["log_prob_abs_diff_mean"]["value"] == pytest.approx(abs(d).mean())
        assert found[name]["statistics"]["log_prob_abs_diff_mean"] == pytest.approx(abs(d).mean())
        for statistic in ("k1", "k3", "seq_kl"):
            assert found[name]["statistics"][statistic] == pytest.approx(values[statistic]["value"])
        assert values["k3"]["low"] < values["k3"]["value"] < values["k3"]["high"]
        assert found[name]["found"] == {
            "rollout": [dtype],
            "training": {"autocast": dtype, "weights": [dtype]},
        }
        cut = [row["cut"] for row in mine]
        assert found[name]["cut_share"] == pytest.approx(np.mean(cut)) and any(cut)
    factors = found["fp16"]["factors of bf16 over it"]
    assert factors["log_prob_abs_diff_mean"]["value"] == pytest.approx(
        found["bf16"]["statistics"]["log_prob_abs_diff_mean"] / found["fp16"]["statistics"]["log_prob_abs_diff_mean"]
    )
    header, *lines = [line.split("\t") for line in result.stdout.splitlines() if "\t" in line]
    assert header[0] == "training/rollout" and [line[0] for line in lines] == ["bf16", "fp16"]
    assert f"{int(np.mean(cut) * 1000) / 10:.0f}" in result.stdout and "of the answers were cut" in result.stdout
    assert (tmp_path / "out" / "mismatch.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_run_goes_on_and_comes_to_the_same(faked, monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "_SEQUENCES_OF_A_PART", 8)
    FakeSampler.stop_after = 50
    assert refused(mismatch(faked, *OPTIONS), 130).startswith("interrupted; what was done is in out")
    kept = list(folder.samples(tmp_path / "out" / "tokens" / "bf16"))
    assert len(kept) == 50 and not (tmp_path / "out" / "mismatch.json").exists()
    FakeSampler.stop_after = None
    assert mismatch(faked, *OPTIONS).exit_code == 0
    assert list(folder.samples(tmp_path / "out" / "tokens" / "bf16"))[:50] == kept, "what was kept is not done again"
    assert mismatch(faked, *OPTIONS, output="once").exit_code == 0
    twice, once = read()["measurements"], read("once")["measurements"]
    for name in once:
        for statistic in ("tokens", "k3", "log_prob_abs_diff_mean"):
            assert twice[name]["statistics"][statistic] == pytest.approx(once[name]["statistics"][statistic])
        assert twice[name]["intervals"]["k3"] == pytest.approx(once[name]["intervals"]["k3"])


def test_nothing_is_done_twice_and_another_precision_is_added(faked):
    assert mismatch(faked, *OPTIONS).exit_code == 0
    made = len(FakeSampler.made), len(FakeTrainingSide.made)
    assert mismatch(faked, *OPTIONS).exit_code == 0
    assert (len(FakeSampler.made), len(FakeTrainingSide.made)) == made == (2, 2)
    assert mismatch(faked, *OPTIONS, "--precision", "bf16,fp16/bf16,fp32").exit_code == 0
    assert [sampler["dtype"] for sampler in FakeSampler.made[2:]] == ["float32"]
    assert [dtype for dtype, *_ in FakeTrainingSide.made[2:]] == ["float16", "float32"]
    assert list(read()["measurements"]) == ["bf16", "fp16/bf16", "fp32"]
    result = mismatch(faked, *OPTIONS, "--precision", "bf16,fp16,fp32,fp16/bf16,bf16/fp16")
    assert "the picture has the first 4 of 5" in result.stdout


def test_a_scoring_that_stopped_between_parts_goes_on(faked, monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "_SEQUENCES_OF_A_PART", 8)
    assert mismatch(faked, *OPTIONS).exit_code == 0
    target = tmp_path / "out" / "training" / "bf16@bf16"
    gone = folder.parts(target)[3]
    before = read()
    gone.unlink()
    assert mismatch(faked, *OPTIONS).exit_code == 0
    assert gone.exists() and read() == before


def test_the_same_tokens_for_all(faked, tmp_path):
    result = mismatch(faked, *OPTIONS, "--same-tokens", "--precision", "fp16,bf16")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out" / "tokens").iterdir()) == ["fp16"]
    assert sorted(path.name for path in (tmp_path / "out" / "rollout").iterdir()) == ["bf16@fp16", "fp16@fp16"]
    found = read()["measurements"]
    assert found["fp16"]["tokens"] == found["bf16"]["tokens"]
    factor = found["bf16"]["factors of fp16 over it"]["log_prob_abs_diff_mean"]
    assert factor["value"] == pytest.approx(1 / 8, rel=0.1) and factor["high"] < 0.15


def test_lengths_are_drawn_as_they_were_asked_for(faked, tmp_path):
    assert mismatch(faked, "--samples", "20", "--lengths", "5:20").exit_code == 0
    lengths = [row["length"] for row in pq.read_table(tmp_path / "out" / "sequences.parquet").to_pylist()]
    assert set(lengths) == set(range(5, 21))
    assert read()["measurements"]["bf16"]["cut_share"] == 0


def test_the_ladder_has_a_row_for_each_cause(faked, tmp_path):
    result = mismatch(faked, "--samples", "4", "--max-tokens", "24", "--ladder")
    assert result.exit_code == 0, result.output
    from verl_fp16.gap_report.sides import ladder

    assert list(read()["measurements"]) == [row.name for row in ladder()]
    assert ("bfloat16", True, 1.0) in [made[:3] for made in FakeTrainingSide.made]
    assert ("float16", False, 0.6) in [made[:3] for made in FakeTrainingSide.made]
    rounded = [made for made in FakeSampler.made if made["model"] != faked]
    assert [made["dtype"] for made in rounded] == ["float16"]
    assert [made["temperature"] for made in FakeSampler.made if made.get("raw_log_probs")] == [0.6]
    assert [made["top_p"] for made in FakeSampler.made if made.get("top_p", 1.0) != 1.0] == [0.8]
    assert (tmp_path / "out" / "ladder.png").read_bytes()[:4] == b"\x89PNG"


def test_weights_are_rounded_once_and_kept_in_float32(faked, tmp_path):
    import torch
    from safetensors.torch import load_file

    from verl_fp16.gap_report.rounding import round_weights

    target = round_weights(faked, "bfloat16", tmp_path / "rounded")
    before, after = load_file(faked / "model.safetensors"), load_file(target / "model.safetensors")
    assert all(torch.equal(after[name], before[name].bfloat16().float()) for name in before)
    assert any(not torch.equal(after[name], before[name].float()) for name in before)
    assert {path.name for path in target.iterdir()} == {path.name for path in faked.iterdir()}
    time = (target / "model.safetensors").stat().st_mtime_ns
    assert (round_weights(faked, "bfloat16", target) / "model.safetensors").stat().st_mtime_ns == time


def test_a_folder_of_another_measurement_is_left_alone_until_restart(faked):
    assert mismatch(faked, *OPTIONS).exit_code == 0
    before = read()
    told = refused(mismatch(faked, *OPTIONS, "--seed", "1"))
    assert "out was begun with something else (seed was 0 and is 1)" in told and "--restart" in told
    assert read() == before
    assert mismatch(faked, *OPTIONS, "--seed", "1", "--restart").exit_code == 0
    assert read()["made_of"]["seed"] == 1


def test_restart_takes_away_all_that_was_made_of_another_model(faked, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    few = ("--samples", "2", "--max-tokens", "8", "--ladder")
    assert mismatch(faked, *few).exit_code == 0
    other = shutil.copytree(faked, tmp_path / "other")
    weights = {name: value + 1 for name, value in load_file(faked / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert mismatch(other, *few, "--restart").exit_code == 0
    rounded = load_file(tmp_path / "out" / "rounded" / "bf16" / "model.safetensors")
    assert all(torch.equal(rounded[name], weights[name].bfloat16().float()) for name in weights)


def test_the_rows_are_those_of_the_numbers_beside_them(faked, tmp_path):
    few, rows = ("--samples", "3", "--max-tokens", "8"), tmp_path / "out" / "sequences.parquet"
    assert mismatch(faked, *few, "--precision", "bf16,fp16").exit_code == 0
    assert pq.read_table(rows)["prompt"].to_pylist() == [number // 3 for number in range(3 * PROMPTS)] * 2
    rows.write_bytes(b"PAR1, and no more of it")
    assert mismatch(faked, *few, "--precision", "fp32,bf16").exit_code == 0
    assert list(dict.fromkeys(pq.read_table(rows)["measurement"].to_pylist())) == list(read()["measurements"])


def test_what_was_refused_before_anything_was_made_binds_nobody(faked):
    assert "Set a shorter --max-tokens" in refused(mismatch(faked, "--max-tokens", "500"))
    assert mismatch(faked, "--max-tokens", "24").exit_code == 0
    assert "max_tokens was 24 and is 23" in refused(mismatch(faked, "--max-tokens", "23"))


def test_gpus_that_a_layer_is_spread_over_decide_its_rounding_and_are_not_mixed(faked):
    assert mismatch(faked, *OPTIONS).exit_code == 0
    assert "tensor_parallel_size was 1 and is 2" in refused(mismatch(faked, *OPTIONS, "--tensor-parallel-size", "2"))
    assert mismatch(faked, *OPTIONS, "--gpu-memory-utilization", "0.5").exit_code == 0


def test_vllm_is_built_for_the_tokens_that_there_are(faked):
    """For the model's own length it may have no room: 128,000 tokens of a large model are tens of GB."""
    assert mismatch(faked, *OPTIONS, "--same-tokens", "--precision", "bf16,fp16").exit_code == 0
    longest = max(
        len(prompt) + len(answer)
        for part in folder.parts(Path("out/tokens/bf16"))
        for prompt, answer in zip(*(folder.read_part(part)[name] for name in ("prompt", "answer")), strict=True)
    )
    assert [sampler["max_model_len"] for sampler in FakeSampler.made] == [4 + 24, longest + 1, longest + 1]


def test_tokens_that_are_not_finite_are_counted_and_left_out(faked, monkeypatch):
    rule = gap_fakes.log_prob

    def with_faults(tokens, dtype, salt):
        values = rule(tokens, dtype, salt)
        if salt == 2 and dtype == "float16":
            values[np.asarray(tokens) < 20] = -np.inf
        return values

    monkeypatch.setattr(gap_fakes, "log_prob", with_faults)
    result = mismatch(faked, *OPTIONS)
    found = read()["measurements"]["fp16"]["statistics"]
    assert found["nonfinite_training"] > 50 and found["k3"] < 1e-4
    assert f"fp16: {int(found['nonfinite_training'])} log-probabilities are not finite" in result.stdout
    monkeypatch.setattr(gap_fakes, "log_prob", lambda t, *_: np.full(len(t), np.nan, np.float32))
    assert "no token has two finite log-probabilities" in refused(mismatch(faked, *OPTIONS, output="nan"))


def test_a_stage_that_is_ended_keeps_the_answers_that_it_has(tmp_path):
    """Ctrl-C ends it with SIGTERM, and a part of 256 answers may take an hour."""
    import signal
    import subprocess
    import sys
    import time

    script = tmp_path / "stage.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from verl_fp16.gap_report import stage\n"
        "from verl_fp16.sampling import Answer, Request\n"
        "class Sampler:\n"
        "    def sample(self, rows):\n"
        "        for row in rows:\n"
        "            yield row, [Answer([1, 2], '', False, [-1.0, -2.0])]\n"
        "            if row.key == 4: Path('ready').touch(); time.sleep(60)\n"
        "def fake(tell):\n"
        "    rows = (Request(n, [1], n) for n in range(9))\n"
        "    for _ in stage.keep_samples(Sampler(), rows, Path('tokens')): pass\n"
        "stage.STAGES['fake'] = fake\n"
        "raise SystemExit(stage.main())\n"
    )
    (tmp_path / "spec.json").write_text('{"stage": "fake"}')
    process = subprocess.Popen(
        [sys.executable, str(script), "spec.json", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(stage.__file__).parents[2])},
    )
    try:
        for _ in range(600):
            if (tmp_path / "ready").exists():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) != 0
    finally:
        process.kill()
    assert list(folder.samples(tmp_path / "tokens")) == [0, 1, 2, 3, 4]


def test_answers_are_written_after_a_while_where_they_are_few(faked, monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "_SECONDS_OF_A_PART", 0.0)
    assert mismatch(faked, "--samples", "2", "--max-tokens", "8").exit_code == 0
    assert len(folder.parts(tmp_path / "out" / "tokens" / "bf16")) == 2 * PROMPTS


def test_what_does_not_tell_two_apart_says_so(faked, monkeypatch):
    assert "do not tell" not in mismatch(faked, *OPTIONS).stdout
    monkeypatch.setitem(gap_fakes.ERROR, "bfloat16", gap_fakes.ERROR["float16"])
    alike = mismatch(faked, *OPTIONS, output="alike").stdout
    assert "answers do not tell fp16 from bf16 (the factor's interval contains 1): raise --limit or --samples" in alike
