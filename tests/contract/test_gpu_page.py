"""The README's section on GPUs says what the result files say, and what there is no file of is not verified."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_page
import pytest

ROOT = Path(__file__).parents[2]
HEAD = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "570.1",
    "date": "2026-12-01",
    "versions": {"verl_fp16": "0.1.0", "torch": "2.13.0", "vllm": None},
    "commit": "0123456789abcdef0123456789abcdef01234567",
}
CASES = """<testcase classname="tests.gpu.test_one" name="test_a" time="1.5" />
<testcase classname="tests.gpu.test_one" name="test_b[two ranks]" time="0.25"><failure>y</failure></testcase>
<testcase classname="tests.gpu.test_one" name="test_c" time="0"><skipped message="2 GPUs are needed" /></testcase>
<testcase classname="tests.gpu.test_one" name="test_d" time="0"><skipped message="2 GPUs are needed" /></testcase>
<testcase classname="tests.gpu.test_two.TestIt" name="test_e" time="0.5" />
<testcase classname="" name="tests.gpu.test_three" time="0"><error message="collection failure">z</error></testcase>"""
COUNTS = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": [], "skips": []}
FACTS = {
    "rehearsal": False,
    "gpu": HEAD["gpu"],
    "driver": HEAD["driver"],
    "versions": HEAD["versions"],
    "commit": HEAD["commit"],
    "files": ["tests/gpu/test_one.py", "tests/gpu/test_three.py", "tests/gpu/test_two.py"],
    "deselected": 0,
}


def report(cases: str = CASES, **facts: object) -> str:
    """pytest's, of a run that tests/gpu/conftest.py said these facts of."""
    told = html.escape(json.dumps(FACTS | facts))
    return (
        '<testsuites name="pytest tests"><testsuite name="pytest" timestamp="2026-12-01T23:59:10.123+00:00" '
        f'hostname="x"><properties><property name="verl_fp16" value="{told}" /></properties>{cases}</testsuite>'
        "</testsuites>"
    )


@pytest.fixture
def collect_tests(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import collect_tests

    return collect_tests


@pytest.fixture
def folder(tmp_path, collect_tests) -> Path:
    """Results of all three kinds."""
    (tmp_path / "report.xml").write_text(report())
    files = collect_tests.read_report(tmp_path / "report.xml")["files"]
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
            "attention": "flash_attention_2",
            "log_probs": "flash-attn's cross entropy",
        },
        "rollout": {
            "unit": "tokens/s",
            "sides": {"bfloat16": {"median": 900.0, "quartiles": [800.0, 1000.0]}},
            "ratios": {},
        },
        "log_prob": {
            "unit": "tokens/s",
            "sides": {"bfloat16": {"median": 50000.0, "quartiles": [40000.0, 60000.0]}},
            "ratios": {},
            "attention": "sdpa",
            "log_probs": "verl's loop over tokens",
        },
        "sync": {"failed": "exit code 1: ImportError:\n no vllm"},
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
    end = "| driver 570.1; commit 0123456789; verl_fp16 0.1.0, torch 2.13.0 |"
    assert f"{start} the tests under tests/gpu | 2 | 2 | 2 {end}" in table
    assert f"{start} the selftest | 1 | 1 | 1 {end}" in table
    assert f"{start} the benchmarks under benchmarks/gpu | 3 | 2 | 0 {end}" in table


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
    assert "\nupdate: attention flash_attention_2, log-probs by flash-attn's cross entropy. " in table
    told = (
        " log-prob pass: attention sdpa, log-probs by verl's loop over tokens, so that the launching of small kernels"
    )
    assert f"{told} is measured as well." in table


def test_one_kind_alone_leaves_the_others_unverified(folder):
    (folder / "selftest-gpu-h100.json").unlink()
    table = gpu_page.gpu_table(folder)
    assert table.count("Not yet verified on a GPU") == 1 and "the selftest. There is no" in table


def test_parts_that_were_not_measured_are_told(folder):
    file = folder / "gpu-h100.json"
    result = json.loads(file.read_text())
    del result["parts"]["rollout"], result["parts"]["sync"]
    file.write_text(json.dumps(result))
    lines = gpu_page.gpu_table(folder).splitlines()
    assert "- NVIDIA H100 80GB HBM3, not measured: rollout (vLLM), weight sync" in lines


@pytest.mark.parametrize(
    ("name", "body", "what"),
    (
        (
            "gpu-tests",
            {"files": {"tests/gpu/test_one.py": {**COUNTS, "skipped": 3, "skips": ["no CUDA device here"]}}},
            "the tests under tests/gpu",
        ),
        ("selftest-gpu", {"rows": [{"name": "run", "status": "SKIP", "reason": "x"}]}, "the selftest"),
        ("gpu", {"parts": {"sync": {"failed": "x"}}}, "the benchmarks under benchmarks/gpu"),
    ),
)
def test_what_nothing_passed_of_is_not_verified(tmp_path, name, body, what):
    (tmp_path / f"{name}-h100.json").write_text(json.dumps(HEAD | body))
    table = gpu_page.gpu_table(tmp_path)
    assert table.count("Not yet verified on a GPU") == 3
    assert f"**Not yet verified on a GPU:** {what}. In `benchmarks/results/{name}-*.json` nothing passed." in table
    assert "| NVIDIA H100 80GB HBM3 |" in table


@pytest.mark.parametrize(
    ("name", "text", "told"),
    (
        ("gpu", "{}", "is no result of the benchmarks under benchmarks/gpu: it has no date and no gpu"),
        ("gpu", "{", "is no JSON"),
        ("gpu", "[]", "is no result of the benchmarks"),
        ("gpu", {"parts": {}}, "its parts are empty"),
        ("gpu-tests", {"files": {}}, "its files are empty"),
        ("selftest-gpu", {"rows": []}, "its rows are empty"),
        ("selftest-gpu", {"rows": [{"name": "run", "status": "PASS"}], "gpu": None}, "it names no GPU"),
        ("selftest-gpu", {"rows": [{"name": "run", "status": "PASS"}], "gpu": "cpu"}, "it names no GPU"),
        ("gpu-tests", {"files": {"tests/gpu/test_one.py": {"passed": 1}}}, "tests/gpu/test_one.py has no failed"),
        ("selftest-gpu", {"rows": [{"name": "run"}]}, "a row has no status"),
        ("gpu", {"parts": {"sync": {"sides": {}}}}, "the part sync has neither figures nor a reason"),
        ("gpu", {"parts": {"snyc": {"failed": "x"}}}, "there is no part snyc"),
        ("gpu", {"parts": {"sync": {"failed": "x"}}, "versions": {"torch": "2"}}, "no version of verl_fp16"),
    ),
)
def test_a_file_that_is_no_result_is_named_with_what_is_wrong(tmp_path, name, text, told):
    (tmp_path / f"{name}-h100.json").write_text(text if isinstance(text, str) else json.dumps(HEAD | text))
    with pytest.raises(ValueError, match=f"{name}-h100.json.*{told}"):
        gpu_page.gpu_table(tmp_path)


@pytest.mark.parametrize("status", ("fine", ""))
def test_a_status_that_nobody_knows_is_not_counted_as_anything(tmp_path, status):
    row = {"name": "scaler", "status": status, "reason": "", "seconds": 1.0}
    (tmp_path / "selftest-gpu-h100.json").write_text(json.dumps(HEAD | {"rows": [row]}))
    with pytest.raises(ValueError, match="status"):
        gpu_page.gpu_table(tmp_path)


def collect(folder: Path, text: str | None) -> subprocess.CompletedProcess:
    """The command, of a report with this text."""
    if text is not None:
        (folder / "report.xml").write_text(text)
    command = [sys.executable, "benchmarks/gpu/collect_tests.py", str(folder / "report.xml")]
    return subprocess.run([*command, "--output", str(folder / "out.json")], cwd=ROOT, capture_output=True, text=True)


def test_pytests_report_is_counted_by_file(tmp_path):
    """Also of tests that failed, and without those of another tier; where and when they ran, the report says itself."""
    done = collect(tmp_path, report(f'{CASES}<testcase classname="tests.unit.test_other" name="test_a" time="1" />'))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert {name: result[name] for name in HEAD} == HEAD and result.keys() == {*HEAD, "files"}
    assert list(result["files"]) == FACTS["files"]
    assert result["files"]["tests/gpu/test_one.py"] == {
        "passed": 1,
        "failed": 1,
        "skipped": 2,
        "seconds": 1.75,
        "failures": ["test_b[two ranks]"],
        "skips": ["2 GPUs are needed"],
    }
    assert gpu_page.gpu_table(tmp_path).count("Not yet verified") == 3, "out.json is not among the results"


@pytest.mark.parametrize(
    ("text", "told"),
    (
        ("<testsuites/>", "has no tests"),
        ("no xml", "is no report"),
        (None, "cannot be read"),
        (report().replace('name="verl_fp16"', 'name="x"'), "does not say where its tests ran"),
        (report(rehearsal=True), "is of a rehearsal on a CPU"),
        (
            report(files=[*FACTS["files"], "tests/gpu/test_four.py"]),
            "is of a part of them: without tests/gpu/test_four.py",
        ),
        (report(deselected=7), "is of a part of them: 7 were left out"),
        (report().replace("timestamp=", "t="), "does not say when"),
        (report().replace("2026-12-01", "yesterday"), "does not say when"),
        (report(gpu=""), "does not say where its tests ran"),
    ),
)
def test_what_is_no_report_of_all_tests_on_a_gpu_is_refused_in_one_line(tmp_path, text, told):
    done = collect(tmp_path, text)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out.json").mkdir()
    done = collect(tmp_path, report())
    assert done.returncode == 2 and "--output" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_of_the_tests_says_where_it_ran(tmp_path, collect_tests):
    """Of a rehearsal, with some tests left out; the report of a real one differs in what it says."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu/test_cuda_autocast.py", "-k", "not_rounded"]
    environment = {**os.environ, "VERL_FP16_REHEARSE_GPU_TESTS": "1"}
    command += [f"--junitxml={tmp_path / 'report.xml'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    facts = collect_tests.read_report(tmp_path / "report.xml")["facts"]
    assert facts.keys() == FACTS.keys() and facts["rehearsal"] is True and facts["gpu"] == "cpu"
    assert facts["files"] == sorted(f"tests/gpu/{file.name}" for file in (ROOT / "tests" / "gpu").glob("test_*.py"))
    assert facts["versions"]["verl_fp16"] and facts["deselected"] == 3
    assert collect(tmp_path, None).returncode == 2
