"""Reading verl's metrics file, showing it while it grows, and reporting it at the end."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from verl_fp16.quickstart import report
from verl_fp16.quickstart.progress import MetricsTail, RunDisplay, clock, number
from verl_fp16.quickstart.report import parse_line, read_metrics, summarise, table, write_summary

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
VALIDATION = "val-core/sums/two digits/acc/mean@1"


def line(step: int, **data: float | None) -> str:
    names = {
        "reward": report.REWARD,
        "gap": report.GAP,
        "entropy": report.ENTROPY,
        "scale": report.LOSS_SCALE,
        "skipped": report.SKIPPED,
        "val": VALIDATION,
        "seconds": "timing_s/step",
    }
    return json.dumps({"step": step, "data": {names.get(key, key): value for key, value in data.items()}}) + "\n"


RUN = [
    line(0, val=0.25),
    line(1, reward=0.2, gap=1e-4, entropy=1.5, scale=65536, skipped=1, seconds=10),
    line(2, reward=0.4, gap=3e-4, entropy=1.0, scale=32768, skipped=0, seconds=14, val=0.5),
    line(3, reward=0.6, gap=None, entropy=0.5, scale=32768, skipped=2, seconds=12, val=0.75),
]


@pytest.fixture
def metrics_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(RUN))
    return path


def test_lines_that_are_no_metrics_are_left_out():
    for text in ("", "{", '{"step": 1, "da', "[]", "3", '{"step": "x", "data": {}}', '{"step": 1}', '{"data": {}}'):
        assert parse_line(text) is None
    assert parse_line(b"\xff\xfe") is None
    entry = parse_line('{"step": 4, "data": {"a": 1, "b": null, "c": NaN, "d": Infinity, "e": "text", "f": [1]}}')
    assert entry.step == 4 and set(entry.data) == {"a", "b", "c", "d"}
    assert entry.get("a") == 1.0 and math.isnan(entry.get("b")) and entry.get("d") == math.inf
    assert entry.get("missing") is None


def test_half_written_and_split_steps(metrics_file, tmp_path):
    with open(metrics_file, "a") as out:
        out.write(line(2, extra=7) + '{"step": 4, "data": {"critic/sc')
    metrics = read_metrics(metrics_file)
    assert [entry.step for entry in metrics] == [0, 1, 2, 3]
    assert metrics[2].get("extra") == 7 and metrics[2].get(report.REWARD) == 0.4
    assert read_metrics(tmp_path / "none") == []


def test_tail_waits_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == []
    path.write_text(RUN[0] + RUN[1][:20])
    assert [entry.step for entry in tail.read()] == [0]
    assert tail.read() == []
    with open(path, "a") as out:
        out.write(RUN[1][20:])
    assert [entry.get(report.REWARD) for entry in tail.read()] == [0.2]
    path.write_text(RUN[0])
    assert [entry.step for entry in tail.read()] == [0], "a file that starts anew is read from its start"


def test_summary(metrics_file):
    summary = summarise(read_metrics(metrics_file), n_validation=48)
    assert summary == {
        "steps": 3,
        "seconds": 36.0,
        "accuracy_before": 0.25,
        "accuracy_before_standard_error": pytest.approx(math.sqrt(0.25 * 0.75 / 48)),
        "accuracy_after": 0.75,
        "accuracy_after_standard_error": pytest.approx(0.0625),
        "accuracy_after_step": 3,
        "n_validation": 48,
        "prob_gap_mean": pytest.approx(2e-4),
        "gap_not_finite": 1,
        "log_prob_gap_mean": None,
        "log_ppl_abs_diff_mean": None,
        "entropy_first": 1.5,
        "entropy_last": 0.5,
        "loss_scale_last": 32768.0,
        "skipped_steps": 3,
    }
    assert summarise(read_metrics(metrics_file), seconds=99)["seconds"] == 99


def test_log_prob_metrics_keep_their_own_names(tmp_path):
    path = tmp_path / "m"
    path.write_text(line(1, **{report.LOG_PPL_ABS_DIFF: 1e-3, "x": 5.0}) + line(2, **{report.LOG_PPL_ABS_DIFF: 3e-3}))
    summary = summarise(read_metrics(path), log_prob_key="x")
    assert summary["log_ppl_abs_diff_mean"] == pytest.approx(2e-3)
    assert summary["log_prob_gap_mean"] == 5.0


def test_a_run_without_steps_has_no_numbers(tmp_path):
    summary = summarise([])
    assert summary["steps"] == summary["gap_not_finite"] == 0
    assert {value for key, value in summary.items() if key not in ("steps", "gap_not_finite")} == {None}
    # A validation before training is no result of training.
    (tmp_path / "m").write_text(RUN[0])
    summary = summarise(read_metrics(tmp_path / "m"), n_validation=8)
    assert (summary["steps"], summary["accuracy_before"], summary["accuracy_after"]) == (0, 0.25, None)


def test_summary_file_is_strict_json_and_whole(tmp_path):
    path = tmp_path / "new" / "summary.json"
    values = {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": 1.5, "e": None, "f": "x"}
    assert write_summary(path, values) == path

    def refuse(constant: str) -> None:
        raise AssertionError(f"not strict JSON: {constant}")

    expected = {"a": None, "b": [None, {"c": None}], "d": 1.5, "e": None, "f": "x"}
    assert json.loads(path.read_text(), parse_constant=refuse) == expected
    with pytest.raises(TypeError):
        write_summary(path, {"a": object()})
    assert json.loads(path.read_text()) == expected
    assert os.listdir(path.parent) == ["summary.json"]


def test_summary_file_survives_a_failed_replacement(tmp_path, monkeypatch):
    path = write_summary(tmp_path / "summary.json", {"a": 1})

    def fail(*_: object) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_summary(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def rendered(summary: dict) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table(summary, title="a run"))
    return console.file.getvalue()


def test_table(metrics_file):
    text = rendered(summarise(read_metrics(metrics_file), n_validation=48, seconds=75))
    for part in ("25.0% ± 6.2% → 75.0% ± 6.2%", "2.00e-04", "1.500 → 0.500", "32,768", "3 of 3", "1 min 15 s"):
        assert part in text
    assert "|Δ log p|" not in text
    assert "- → -" in rendered(summarise([]))
    assert "nan" in rendered({"prob_gap_mean": math.nan})


def test_figure(metrics_file, tmp_path):
    for name, metrics in {
        "run": read_metrics(metrics_file),
        "none": [],
        "odd": [
            parse_line(line(1, reward=None, gap=0.0, scale=0, entropy=-0.1, skipped=1)),
            parse_line(line(2, gap=1)),
        ],
    }.items():
        data = report.draw(metrics, tmp_path / f"{name}.png", "a run").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", data[16:24]) == (1800, 1200)
    sizes = [(tmp_path / f"{name}.png").stat().st_size for name in ("run", "none")]
    assert sizes[0] > sizes[1] + 10_000, "the curves are in the figure"


def test_report_can_be_read_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import verl_fp16.quickstart.report as r; r.summarise([])"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


class Screen:
    """A display with a clock of our own, fed line by line."""

    def __init__(self, tmp_path: Path, terminal: bool, **options) -> None:
        self.time = 100.0
        self.path = tmp_path / "metrics.jsonl"
        self.console = Console(file=io.StringIO(), force_terminal=terminal, width=110, _environ={})
        options = {"stage": "2/3 starting verl", "training_stage": "3/3 GRPO", "estimate_s": 600} | options
        self.display = RunDisplay(self.path, 10, console=self.console, now=lambda: self.time, **options)

    def feed(self, seconds: float, *lines: str) -> list[str]:
        self.time += seconds
        with open(self.path, "a") as out:
            out.writelines(lines)
        before = len(self.console.file.getvalue())
        self.display.tick()
        return self.console.file.getvalue()[before:].splitlines()


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    screen = Screen(tmp_path, terminal=False)
    with screen.display:
        assert screen.console.file.getvalue() == "[2/3 starting verl] elapsed 0:00, left about 10:00\n"
        assert screen.feed(60) == []
        assert screen.feed(0, RUN[0]) == [
            "[3/3 GRPO] elapsed 1:00, left about 9:00",
            "step 0/10: reward -, gap -, entropy -, loss scale -, skipped -, validation 25.0%, "
            "elapsed 1:00, left about 9:00",
        ]
        assert screen.feed(10, *RUN[1:3], RUN[3][:30]) == [
            "step 1/10: reward 0.200, gap 1.00e-04, entropy 1.500, loss scale 65,536, skipped 1, validation 25.0%, "
            "elapsed 1:10, left about 1:30",
            "step 2/10: reward 0.400, gap 3.00e-04, entropy 1.000, loss scale 32,768, skipped 1, "
            "validation 25.0% to 50.0%, elapsed 1:10, left about 1:36",
        ]
        (third,) = screen.feed(15, RUN[3][30:])
        assert "gap nan" in third and "skipped 3" in third and third.endswith("elapsed 1:25, left about 1:24")
        (last,) = screen.feed(80, line(10, reward=math.inf))
        assert "reward inf" in last and "gap -" in last and last.endswith("left 0:00")
        (validated,) = screen.feed(0, line(10, val=0.9))
        assert "reward inf" in validated and "25.0% to 90.0%" in validated


def test_time_left_without_step_times_and_without_estimate(tmp_path):
    screen = Screen(tmp_path, terminal=False, estimate_s=None)
    with screen.display:
        assert screen.display.left_s is None
        screen.feed(50, line(1, reward=0))
        assert screen.display.left_s is None, "the first step's own time is not known"
        screen.feed(20, line(2, reward=0))
        screen.feed(60, line(3, reward=0))
        screen.feed(20, line(4, reward=0))
        assert screen.display.left_s == 6 * 20
        screen.feed(5)
        assert screen.display.left_s == 6 * 20 - 5
        screen.feed(1000)
        assert screen.display.left_s == 0


def test_panel_on_a_terminal(tmp_path):
    screen = Screen(tmp_path, terminal=True, title="[quick] start")
    with screen.display:
        screen.feed(1, *RUN)
    text = Console(width=110).render_str(screen.console.file.getvalue(), markup=False).plain
    frame = text[text.rindex("╭") :]
    for part in ("[quick] start", "3/3 GRPO", "step 3 of 10", "0.600", "nan", "32,768", "25.0% to 75.0%", "▁", "█"):
        assert part in frame


def test_numbers_and_clocks():
    assert [number(value) for value in (None, math.nan, -math.inf, 0.5)] == ["-", "nan", "-inf", "0.500"]
    assert number(math.nan, ".1%") == "nan"
    assert [clock(value) for value in (None, math.nan, -3, 59.6, 3599, 3661)] == [
        *("-", "-", "0:00", "1:00", "59:59", "1:01:01")
    ]
