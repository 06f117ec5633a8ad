"""The README's section on GPUs says what the result files say, and what there is no file of is not verified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu_page
import pytest

ROOT = Path(__file__).parents[2]
HEAD = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "570.1", "date": "2026-12-01", "versions": {"torch": "2.13.0"}}
REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.gpu.test_one" name="test_a" time="1.5" />
<testcase classname="tests.gpu.test_one" name="test_b[two ranks]" time="0.25"><failure>y</failure></testcase>
<testcase classname="tests.gpu.test_one" name="test_c" time="0"><skipped message="2 GPUs are needed" /></testcase>
<testcase classname="tests.gpu.test_one" name="test_d" time="0"><skipped message="2 GPUs are needed" /></testcase>
<testcase classname="tests.gpu.test_two.TestIt" name="test_e" time="0.5" />
<testcase classname="" name="tests.gpu.test_three" time="0"><error message="collection failure">z</error></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def collect_tests(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import collect_tests

    return collect_tests


@pytest.fixture
def folder(tmp_path, collect_tests) -> Path:
    """Results of all three kinds."""
    (tmp_path / "report.xml").write_text(REPORT)
    files = collect_tests.read_report(tmp_path / "report.xml")
    rows = [
        {"name": "scaler", "status": "passed", "reason": "", "seconds": 1.0},
        {"name": "ipc | shm", "status": "failed", "reason": "no IPC here", "seconds": 2.0},
        {"name": "two ranks", "status": "skipped", "reason": "one GPU", "seconds": 0.0},
    ]
    parts = {
        "update": {
            "unit": "tokens/s",
            "sides": {
                "bfloat16": {"median": 20000.0, "quartiles": [19000.0, 21000.0], "peak_bytes": 2**30},
                "float16": {"median": 21000.0, "quartiles": [20000.0, 22000.0], "peak_bytes": 2**31},
                "float32": {"failed": "too slow"},
            },
            "ratios": {"float16 over bfloat16": {"median": 1.05, "quartiles": [1.01, 1.09]}},
        },
        "sync": {"failed": "exit code 1: ImportError: no vllm"},
        "metrics": {
            "unit": "s",
            "sides": {"verl": {"median": 0.5, "quartiles": [0.4, 0.6], "bytes": 2_000_000}},
            "ratios": {},
        },
    }
    model = {"name": "random", "architecture": "Qwen3ForCausalLM", "parameters": 470_000_000}
    for name, body in {
        "gpu-tests-h100": {"files": files},
        "selftest-gpu-h100": {"rows": rows},
        "gpu-h100": {"parts": parts, "model": model},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(HEAD | body))
    return tmp_path


def test_without_files_nothing_is_verified(tmp_path):
    table = gpu_page.gpu_table(tmp_path)
    assert table.count("Not yet verified on a GPU") == 3 and "|" not in table


def test_files_say_what_ran_where_and_when(folder):
    table = gpu_page.gpu_table(folder)
    assert "Not yet verified" not in table
    start = "| NVIDIA H100 80GB HBM3 | 2026-12-01 |"
    end = "| driver 570.1; torch 2.13.0 |"
    assert f"{start} the tests under tests/gpu | 2 | 2 | 2 {end}" in table
    assert f"{start} the selftest | 1 | 1 | 1 {end}" in table
    assert f"{start} the benchmarks under benchmarks/gpu | 1 | 2 | 0 {end}" in table


def test_what_failed_and_why_something_was_skipped_is_told(folder):
    lines = gpu_page.gpu_table(folder).splitlines()
    gpu = "- NVIDIA H100 80GB HBM3, "
    for told in (
        "failed: tests/gpu/test_one.py test_b[two ranks], tests/gpu/test_three.py tests.gpu.test_three",
        "skipped: tests/gpu/test_one.py: 2 GPUs are needed",
        "failed: ipc | shm: no IPC here",
        "skipped: two ranks: one GPU",
        "failed: weight sync: exit code 1: ImportError: no vllm",
        "failed: update, float32: too slow",
    ):
        assert gpu + told in lines


def test_figures_come_with_their_ratios_and_memory(folder):
    table = gpu_page.gpu_table(folder)
    assert "| update | bfloat16 | 20,000 [19,000, 21,000] tokens/s | 1 | 1.00 GiB |" in table
    assert "| update | float16 | 21,000 [20,000, 22,000] tokens/s | 1.050 [1.010, 1.090] | 2.00 GiB |" in table
    assert "| statistics of the gap | verl | 0.5 [0.4, 0.6] s, 2.0 MB | 1 | - |" in table
    assert "random, Qwen3ForCausalLM of 470 M parameters." in table


def test_one_kind_alone_leaves_the_others_unverified(folder):
    (folder / "selftest-gpu-h100.json").unlink()
    table = gpu_page.gpu_table(folder)
    assert table.count("Not yet verified on a GPU") == 1 and "the selftest. There is no" in table


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "gpu-h100.json").write_text("{}")
    with pytest.raises(ValueError, match="gpu-h100.json is no result of the benchmarks"):
        gpu_page.gpu_table(tmp_path)


@pytest.mark.parametrize("status", ("fine", ""))
def test_a_status_that_nobody_knows_is_not_counted_as_anything(tmp_path, status):
    row = {"name": "scaler", "status": status, "reason": "", "seconds": 1.0}
    (tmp_path / "selftest-gpu-h100.json").write_text(json.dumps(HEAD | {"rows": [row]}))
    with pytest.raises(ValueError, match="status"):
        gpu_page.gpu_table(tmp_path)


def test_pytests_report_is_counted_by_file(tmp_path, collect_tests):
    (tmp_path / "report.xml").write_text(REPORT)
    files = collect_tests.read_report(tmp_path / "report.xml")
    assert list(files) == ["tests/gpu/test_one.py", "tests/gpu/test_three.py", "tests/gpu/test_two.py"]
    assert files["tests/gpu/test_one.py"] == {
        "passed": 1,
        "failed": 1,
        "skipped": 2,
        "seconds": 1.75,
        "failures": ["test_b[two ranks]"],
        "skips": ["2 GPUs are needed"],
    }


@pytest.mark.parametrize(
    ("text", "told"),
    (("<testsuites/>", "has no tests"), ("no xml", "is no report"), (None, "cannot be read")),
)
def test_what_is_no_report_of_pytests_is_refused_in_one_line(tmp_path, text, told):
    report = tmp_path / "report.xml"
    if text is not None:
        report.write_text(text)
    command = [sys.executable, "benchmarks/gpu/collect_tests.py", str(report), "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()
