"""Reading logs of verl's file logger: whole ones to the bit, and whatever is left of broken ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import entry

from verl_fp16.file_log import mark
from verl_fp16.log_entries import as_number, parse_entry
from verl_fp16.run_report import reading
from verl_fp16.run_report.reading import PassedOver, RunLog, read_log


def read(path: Path, content: str | bytes, wanted=lambda name: True) -> RunLog:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_log(path, wanted)


def values(log: RunLog, name: str) -> dict[int, float]:
    series = log.series[name]
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.integers(0, 10**12),
        st.dictionaries(st.sampled_from("abc"), st.floats(width=64, allow_nan=False, allow_infinity=False), min_size=1),
        min_size=1,
    )
)
def test_what_is_written_is_read_to_the_bit(tmp_path_factory, steps):
    path = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    log = read(path, "".join(entry(step, data) for step, data in sorted(steps.items())))
    assert log.steps.tolist() == sorted(steps)
    assert log.passed_over == PassedOver()
    for name in "abc":
        expected = {step: data[name] for step, data in steps.items() if name in data}
        assert (values(log, name) if name in log.series else {}) == expected


def test_only_what_is_wanted_is_kept(path):
    asked = []

    def wanted(name: str) -> bool:
        asked.append(name)
        return name == "b"

    log = read(path, entry(1, {"a": 1, "b": 2}) + entry(2, {"b": 3, "c": 4}), wanted)
    assert set(log.series) == {"b"}
    assert values(log, "b") == {1: 2, 2: 3}
    assert sorted(asked) == ["a", "b", "c"]


def test_null_is_no_finite_number_and_names_of_numbers_are_read(path):
    data = '"null": null, "nan": NaN, "inf": Infinity, "low": -Infinity, "big": 1e400, "flag": true'
    log = read(path, f'{{"step": 1, "data": {{{data}}}}}\n')
    assert {name: values(log, name)[1] for name in ("inf", "low", "big", "flag")} == {
        "inf": math.inf,
        "low": -math.inf,
        "big": math.inf,
        "flag": 1.0,
    }
    assert math.isnan(values(log, "null")[1]) and math.isnan(values(log, "nan")[1])


def test_texts_are_counted_and_left_out(path):
    log = read(path, '{"step": 1, "data": {"a": "text", "b": [1], "c": 2}}\n')
    assert (set(log.series), log.passed_over.texts) == ({"c"}, 2)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        b"\0\0\0",
        b'{"step": 1}',
        b'{"data": {}}',
        b'{"step": "1", "data": {}}',
        b'{"step": true, "data": {}}',
        b'{"step": 1.5, "data": {}}',
        b'{"step": -1, "data": {}}',
        b'{"step": 99999999999999999999, "data": {}}',
        b'{"step": 1, "data": []}',
        b"[" * 100_000,
        b'{"step": 1, "data": {"a": ' + b"[" * 100_000,
    ],
)
def test_what_is_no_entry_is_none(line):
    assert parse_entry(line) is None


def test_whole_numbers_beyond_floats_are_infinite():
    assert (as_number(10**400), as_number(-(10**400)), as_number("1"), as_number([1])) == (
        math.inf,
        -math.inf,
        None,
        None,
    )


def test_broken_lines_are_counted_and_the_rest_is_read(path):
    content = (
        entry(1, {"a": 1}).encode()
        + b"Traceback (most recent call last):\n"
        + b"\0" * 5000
        + b"\n\n  \n"
        + entry(2, {"a": 2}).encode()
        + b'{"step": 3, "data": {"a": 3.'
    )
    log = read(path, content)
    assert values(log, "a") == {1: 1, 2: 2}
    assert log.passed_over == PassedOver(half_written=1, broken=2)


def test_a_last_line_that_only_lacks_its_end_counts(path):
    log = read(path, entry(1, {"a": 1}) + entry(2, {"a": 2}).rstrip("\n"))
    assert values(log, "a") == {1: 1, 2: 2}
    assert log.passed_over == PassedOver()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_log_cut_anywhere_has_the_entries_before_the_cut(tmp_path_factory, data):
    lines = [entry(step, {"a": float(step), "b": 0.1}) for step in range(1, 9)]
    whole = "".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    log = read(tmp_path_factory.getbasetemp() / "cut.jsonl", whole[:cut])
    ends = np.cumsum([len(line) for line in lines])
    complete = int(((ends - 1) <= cut).sum())  # without its newline a line is whole
    assert log.steps.tolist() == list(range(1, complete + 1))
    in_the_middle = cut not in (0, *ends.tolist(), *(ends - 1).tolist())
    assert log.passed_over == PassedOver(half_written=int(in_the_middle))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_at_all_are_passed_over(tmp_path_factory, garbage):
    content = entry(1, {"a": 1}).encode() + garbage + b"\n" + entry(2, {"a": 2}).encode()
    log = read(tmp_path_factory.getbasetemp() / "garbage.jsonl", content)
    assert values(log, "a") == {1: 1, 2: 2}


def test_a_line_without_end_is_not_held(path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_LINE", 1000)
    seen = []
    collector = reading._Collector.take
    monkeypatch.setattr(
        reading._Collector, "take", lambda self, line: (seen.append(line and len(line)), collector(self, line))
    )
    content = entry(1, {"a": 1}).encode() + b"\0" * 10_500 + b"\n" + entry(2, {"a": 2}).encode() + b"\0" * 5000
    log = read(path, content)
    assert values(log, "a") == {1: 1, 2: 2}
    assert log.passed_over == PassedOver(too_long=2)
    assert max(length for length in seen if length is not None) <= 1000


def test_of_a_step_that_was_logged_again_the_last_value_counts(path):
    log = read(path, entry(0, {"val": 0.2}) + entry(1, {"a": 1}) + entry(2, {"a": 2, "b": 2}) + entry(1, {"a": 7}))
    assert values(log, "a") == {1: 7, 2: 2}
    assert values(log, "b") == {2: 2}
    assert log.steps.tolist() == [0, 1, 2]
    assert log.passed_over == PassedOver(again=1)


def test_entries_of_one_step_are_merged_without_a_word(path):
    log = read(path, entry(1, {"a": 1}) + entry(1, {"b": 2}))
    assert (values(log, "a"), values(log, "b"), log.passed_over) == ({1: 1}, {1: 2}, PassedOver())


def test_a_mark_undoes_what_is_past_it(path):
    first = "".join(entry(step, {"a": step}) for step in range(1, 6))
    log = read(path, first + mark(3).decode() + entry(4, {"a": 40}))
    assert values(log, "a") == {1: 1, 2: 2, 3: 3, 4: 40}
    assert (log.steps.tolist(), log.resumed) == ([1, 2, 3, 4], (3,))
    assert log.passed_over == PassedOver(undone=2)


def test_marks_past_the_newest_one_are_undone_too(path):
    lines = [entry(1, {"a": 1}), mark(1).decode(), entry(2, {"a": 2}), mark(2).decode(), entry(3, {"a": 3})]
    assert read(path, "".join([*lines, mark(1).decode(), entry(2, {"a": 9})])).resumed == (1,)


def test_progress_comes_to_the_size_of_the_file(path):
    content = "".join(entry(step, {"a": step, "pad": "x" * 5000}) for step in range(600))
    path.write_text(content)
    told: list[int] = []
    read_log(path, lambda name: name == "a", told.append)
    assert sum(told) == len(content)
    assert len(told) > 2


def test_it_reads_the_same_without_orjson(path):
    path.write_text(entry(1, {"a": 0.1, "b": None}) + entry(2, {"a": 1e-300}) + '{"step": 3, "da')
    code = (
        "import sys\nsys.modules['orjson'] = None\nfrom pathlib import Path\n"
        "from verl_fp16 import log_entries\nfrom verl_fp16.run_report.reading import read_log\nimport json\n"
        "assert log_entries._strict is json.loads\n"
        "log = read_log(Path(sys.argv[1]), lambda name: True)\n"
        "print(json.dumps([{name: series.values.tolist() for name, series in log.series.items()}, "
        "log.passed_over.half_written]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    (found, half) = json.loads(done.stdout)
    assert found["a"] == [0.1, 1e-300] and math.isnan(found["b"][0]) and half == 1


def test_an_empty_file_has_no_steps(path):
    log = read(path, b"")
    assert (len(log.steps), log.series, log.passed_over) == (0, {}, PassedOver())
