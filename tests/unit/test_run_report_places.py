"""Which log, name and evidence a run on the command line means; one line for each thing that it cannot mean."""

from __future__ import annotations

import os

import pytest
from report_runs import entry, loaded, write_evidence, write_log

from verl_fp16.run_report.assemble import load
from verl_fp16.run_report.places import RunError, find_runs


def names(*given: object) -> list[str]:
    return [place.name for place in find_runs([str(path) for path in given])]


def refused(*given: object, evidence: tuple[str, ...] = ()) -> str:
    with pytest.raises(RunError) as error:
        for place in find_runs([str(path) for path in given], evidence):
            load(place)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_means_its_only_log(tmp_path):
    log = write_log(tmp_path / "run" / "metrics.jsonl")
    (log.parent / "rollouts.jsonl").write_text('{"step": 1, "input": "2+2", "output": "4"}\n')
    (place,) = find_runs([str(tmp_path / "run")])
    assert (place.log, place.folder, place.name) == (log, log.parent, "run")


def test_a_log_is_looked_for_in_the_folders_below_too(tmp_path):
    log = write_log(tmp_path / "outputs" / "project" / "experiment.jsonl")
    (place,) = find_runs([str(tmp_path / "outputs")])
    assert (place.log, place.name) == (log, "experiment")


def test_of_several_logs_none_is_chosen(tmp_path):
    for number in range(7):
        write_log(tmp_path / f"metrics-{number}.jsonl")
    text = refused(tmp_path)
    assert text.startswith(f"{tmp_path}: there are 7 logs in it: metrics-0.jsonl, ") and "and 2 more" in text


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a/metrics.jsonl"], ["a"]),
        (["a/fp16.jsonl", "a/bf16.jsonl"], ["fp16", "bf16"]),
        (["a/run/metrics-40.jsonl", "b/run/metrics.jsonl"], ["a/run", "b/run"]),
        (["a/x.jsonl", "b/x.jsonl", "b/y.jsonl"], ["a/x", "b/x", "y"]),
        (["a/x.jsonl", "a/x.jsonl"], ["x (2)", "x (3)"]),
    ],
)
def test_names_come_from_files_and_folders_and_are_unlike(tmp_path, paths, expected):
    logs = [write_log(tmp_path / path) for path in paths]
    assert names(*logs) == expected


def test_given_names_go_before_found_ones(tmp_path):
    one, two = write_log(tmp_path / "a" / "x.jsonl"), write_log(tmp_path / "b" / "y.jsonl")
    assert names(f"y={one}", two) == ["y", "b/y"]


def test_a_path_with_an_equals_sign_that_is_there_is_a_path(tmp_path, monkeypatch):
    write_log(tmp_path / "lr=1e-6" / "run=2.jsonl")
    monkeypatch.chdir(tmp_path)
    assert names("lr=1e-6/run=2.jsonl") == ["run=2"]
    assert names("mine=lr=1e-6/run=2.jsonl") == ["mine"]
    assert names("lr=1e-5=lr=1e-6/run=2.jsonl") == ["lr=1e-5"]


def test_each_wrong_argument_is_one_line_that_names_it(tmp_path):
    log = write_log(tmp_path / "a" / "x.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    (tmp_path / "nothing").mkdir()
    text = tmp_path / "text.jsonl"
    text.write_text("no log\n")
    assert refused(tmp_path / "gone").startswith(f"{tmp_path}/gone: there is no such file or folder.")
    assert refused(f"run={tmp_path}/gone").startswith(f"{tmp_path}/gone: there is no such file")
    assert refused(tmp_path / "nothing").startswith(f"{tmp_path}/nothing: there is no log of verl's in it.")
    assert refused(empty).startswith(f"{empty}: the file is empty")
    assert refused(text).startswith(f"{text}: none of its lines is an entry")
    assert refused("/dev/null").startswith("/dev/null: this is no file.")
    assert refused(f"x={log}", f"x={log}").startswith("x: 2 runs have this name.")
    assert refused(f"={log}").endswith(".jsonl (trainer.logger with `file`), or a folder with one in it")
    assert refused(log, evidence=(str(tmp_path / "gone"),)).startswith(f"--evidence {tmp_path}/gone: there is no such")
    assert "there is no verl_fp16/mismatch in it" in refused(log, evidence=(str(tmp_path / "nothing"),))
    assert "NAME is one of: x" in refused(log, evidence=("y=checkpoints",))


@pytest.mark.skipif(os.geteuid() == 0, reason="this user may read everything")
def test_what_may_not_be_read_is_one_line(tmp_path):
    log = write_log(tmp_path / "a" / "x.jsonl")
    log.chmod(0)
    assert "Permission denied" in refused(log)


@pytest.mark.parametrize(
    "below", ["", "checkpoints", "deep/er/checkpoints"], ids=["in the folder", "beside the log", "below"]
)
def test_evidence_is_found_in_the_folders_of_the_log(tmp_path, below):
    log = write_log(tmp_path / "run" / "metrics.jsonl")
    write_evidence(tmp_path / "run" / below, 2)
    (place,) = find_runs([str(log)])
    assert (place.evidence, place.note) == (tmp_path / "run" / below, "")


def test_evidence_is_found_where_verl_puts_checkpoints_by_default(tmp_path):
    log = write_log(tmp_path / "project" / "experiment.jsonl")
    write_log(tmp_path / "project" / "other.jsonl")
    for experiment in ("experiment", "other"):
        write_evidence(tmp_path / "checkpoints" / "project" / experiment, 2)
    (place,) = find_runs([str(log)])
    assert place.evidence == tmp_path / "checkpoints" / "project" / "experiment"


def test_of_several_folders_of_evidence_that_of_the_logs_name_is_taken_or_none(tmp_path):
    one, three = write_log(tmp_path / "one.jsonl"), write_log(tmp_path / "three.jsonl")
    for name in ("one", "two"):
        write_evidence(tmp_path / "runs" / name, 2)
    first, second = find_runs([str(one), str(three)])
    assert first.evidence == tmp_path / "runs" / "one"
    assert second.evidence is None
    assert second.note.startswith("there are 2 folders with some beside the log; name the run's trainer.default_local")


@pytest.mark.parametrize("part", ["", "verl_fp16", "verl_fp16/mismatch"])
def test_evidence_may_be_named_by_any_of_its_folders(tmp_path, part):
    log = write_log(tmp_path / "a" / "x.jsonl")
    write_evidence(tmp_path / "elsewhere", 2)
    for given in (str(tmp_path / "elsewhere" / part), f"x={tmp_path}/elsewhere/{part}"):
        (place,) = find_runs([str(log)], [given])
        assert place.evidence == tmp_path / "elsewhere"


def test_a_run_without_evidence_says_so(tmp_path):
    (note,) = loaded(write_log(tmp_path / "run" / "metrics.jsonl")).notes
    assert note == (
        "without evidence: none was found beside the log; name the run's trainer.default_local_dir with --evidence "
        "'run=FOLDER'"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", '{"declared": 3, "processes": [1, {"report": null}]}'])
def test_damaged_evidence_is_a_note_and_no_error(tmp_path, content):
    folder = tmp_path / "run"
    log = write_log(folder / "metrics.jsonl")
    step = write_evidence(folder / "checkpoints", 2)
    (folder / "checkpoints" / "verl_fp16" / "read-back.json").write_text(content)
    (folder / "checkpoints" / "verl_fp16" / "skips-actor.jsonl").write_bytes(b"\xff{}\n[]\n" + content.encode())
    (step / "tokens.parquet").write_bytes(b"PAR1" + content.encode())
    (step / "facts.json").write_text('{"alarms": {"a": 1}, "scalars": [], "written": 3}')
    run = loaded(log)
    assert any("tokens.parquet" in note for note in run.notes)
    assert run.evidence.skips == () and run.evidence.tokens == ()


def test_what_was_passed_over_is_told(tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    write_log(log, range(1, 3))
    log.write_text("garbage\n" + log.read_text() + "more\n" + entry(1, {"actor/entropy": "text"}) + '{"step"')
    assert loaded(log).notes[:-1] == [
        "2 lines that are no entries of the logger left out",
        "1 value that is no number left out",
        "1 entry of earlier steps than the one before: of a step, the last value counts",
        "the last line is half-written and was left out",
    ]
