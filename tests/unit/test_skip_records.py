"""Records of skipped updates: one line that names the worst, one JSON line that can be read again."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from verl_fp16.attribution import NonFiniteGradient
from verl_fp16.module_trace import NonFiniteOutput
from verl_fp16.skip_records import MAX_RECORDED, RankFindings, SkipRecord, append, file_of

MODULE = NonFiniteOutput("model.layers.1.mlp", "Qwen3MLP", 3, 1, 512, 60000.0, 0)


def record(*ranks: RankFindings, kind: str = "gradient", scale_after: float = 32768.0, consecutive: int = 1):
    return SkipRecord.of_ranks(
        ranks, kind=kind, role="actor", update=7, scale=65536.0, scale_after=scale_after, consecutive=consecutive
    )


def test_the_worst_parameters_of_all_ranks_come_first():
    few, many = NonFiniteGradient("a.weight", 1, 0, 8), NonFiniteGradient("b.weight", 2, 3, 8)
    others = tuple(NonFiniteGradient(f"c{number}.weight", 0, 1, 8) for number in range(MAX_RECORDED))
    seen = record(RankFindings(0, (few, *others)), RankFindings(1, (many,)))
    assert [(g["parameter"], g["rank"]) for g in seen.gradients[:2]] == [("b.weight", 1), ("a.weight", 0)]
    assert len(seen.gradients) == MAX_RECORDED and seen.gradients_total == MAX_RECORDED + 2
    assert seen.data_ranks is None
    assert seen.line() == (
        "actor update 7 skipped (loss scale 65536, now 32768): the gradients overflowed: b.weight on rank 1: 2 inf and "
        "3 nan of 8; a.weight on rank 0: 1 inf of 8; c0.weight on rank 0: 1 nan of 8; and 19 more"
    )


def test_of_one_rank_it_is_known_whose_data_it_was():
    assert record(RankFindings(0, (NonFiniteGradient("a", 1, 0, 8),))).data_ranks == (0,)


@pytest.mark.parametrize(
    ("ranks", "said"),
    (
        (
            (RankFindings(0), RankFindings(1, forward_fault=True)),
            "the loss or a log-probability was not finite on rank 1; no loss scale cures that",
        ),
        (
            (RankFindings(0, forward_fault=True, traced=True), RankFindings(1, traced=True)),
            "not finite on rank 0, although every module's output was: it begins outside of them",
        ),
        (
            (RankFindings(0, traced=True), RankFindings(1, forward_fault=True, traced=True, module=MODULE)),
            "the forward pass was not finite on rank 1, first in model.layers.1.mlp (Qwen3MLP) on rank 1: 3 inf and 1 "
            "nan of 512, largest input 6e+04",
        ),
    ),
)
def test_a_fault_of_the_forward_pass_says_on_which_rank_and_where(ranks, said):
    seen = record(*ranks, kind="forward", scale_after=65536.0, consecutive=2)
    assert said in seen.line()
    assert "(loss scale stays 65536; skip 2 in a row)" in seen.line()


def test_a_record_is_one_json_line(tmp_path):
    first = record(RankFindings(0, forward_fault=True, traced=True, module=MODULE), kind="forward")
    second = record(RankFindings(0), kind="norm")
    for each in (first, second):
        append(each, tmp_path / "run")
    lines = file_of(tmp_path / "run", "actor").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(json.dumps(asdict(each))) for each in (first, second)]
    assert json.loads(lines[0])["modules"]["0"]["module"] == "model.layers.1.mlp"


@pytest.mark.parametrize("folder", (None, "hdfs://cluster/run"))
def test_without_a_local_folder_nothing_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    append(record(RankFindings(0)), folder)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_told_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    append(record(RankFindings(0)), tmp_path / "file")
    assert "could not be recorded" in capsys.readouterr().err
