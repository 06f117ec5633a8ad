"""The command mismatch on what runs have written."""

from __future__ import annotations

import pytest
from evidence_samples import evidence, token, written
from gap_command import read, refused
from typer.testing import CliRunner

from verl_fp16.cli.app import app


def test_what_a_run_has_written(faked, tmp_path):
    for step in (3, 12):
        written(tmp_path / "a" / "verl_fp16" / "mismatch", step, token(0), token(1), of=evidence(token(0), sequences=9))
    result = CliRunner().invoke(app, ["mismatch", "--from-run", "BF16=a", "--from-run", "a", "-o", "out"])
    assert result.exit_code == 0, result.output
    found = read()["measurements"]
    assert list(found) == ["BF16", "a"] and found["a"]["sequences"] == 18
    # Of evidence_samples: a sequence of row r has 40 - r tokens and a log-ratio of -r / 2.
    assert found["a"]["intervals"]["seq_kl"]["value"] == pytest.approx(2.0)
    assert found["a"]["intervals"]["slope_per_1k_tokens"]["value"] == pytest.approx(500.0)
    assert "a sample of the sequences of 2 steps (3 to 12), and its worst tokens" in result.stdout
    told = refused(CliRunner().invoke(app, ["mismatch", "--from-run", "none", "-o", "o"]))
    assert "none" in told
    assert "NAME=PATH lacks the name" in refused(CliRunner().invoke(app, ["mismatch", "--from-run", "=none"]))


def test_a_name_is_told_from_a_folder_with_an_equals_sign(faked, tmp_path):
    written(tmp_path / "lr=1e-6" / "verl_fp16" / "mismatch", 3, token(0))
    for given, name in (("lr=1e-6", "lr=1e-6"), ("mine=lr=1e-6", "mine")):
        assert CliRunner().invoke(app, ["mismatch", "--from-run", given, "-o", "out"]).exit_code == 0
        assert list(read()["measurements"]) == [name]


def test_evidence_with_numbers_that_are_none_is_read(faked, tmp_path):
    from evidence_samples import FACTS

    facts = {**FACTS, "scalars": {"mismatch/tokens": 9.0, "mismatch/k3": float("nan"), "mismatch/k1": 0.25}}
    written(tmp_path / "a" / "verl_fp16" / "mismatch", 3, token(0), facts=facts)
    result = CliRunner().invoke(app, ["mismatch", "--from-run", "a", "-o", "out"])
    assert result.exit_code == 0, (result.output, result.exception)
    found = read()["measurements"]["a"]
    assert found["statistics"] == {"tokens": 9.0, "k1": 0.25}
    facts = {**FACTS, "scalars": {"mismatch/tokens": 1.0, "mismatch/k1": 1.25}}
    written(tmp_path / "a" / "verl_fp16" / "mismatch", 4, token(0), facts=facts)
    assert CliRunner().invoke(app, ["mismatch", "--from-run", "a", "-o", "out"]).exit_code == 0
    assert read()["measurements"]["a"]["statistics"] == {"tokens": 10.0, "k1": pytest.approx(0.35)}, "by tokens"


def test_an_option_that_would_do_nothing_with_a_run_is_refused(faked, tmp_path):
    written(tmp_path / "a" / "verl_fp16" / "mismatch", 3, token(0))
    result = CliRunner().invoke(app, ["mismatch", "--from-run", "a", "--samples", "9", "--restart"])
    assert refused(result) == "--samples and --restart have no effect beside --from-run: leave them out"
    assert CliRunner().invoke(app, ["mismatch", "--from-run", "a", "--seed", "1", "-o", "out"]).exit_code == 0


def test_a_run_without_evidence_is_told_how_to_have_some(faked, tmp_path):
    (tmp_path / "run").mkdir()
    told = refused(CliRunner().invoke(app, ["mismatch", "--from-run", "run", "-o", "out"]))
    assert told.startswith("run: there is no evidence of a run in it") and "evidence_interval steps (100)" in told
    assert "verl-fp16 mismatch MODEL --prompts FILE" in told
