"""The README's measured tables are what the result files say, and its file names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_are_current():
    check = [sys.executable, "scripts/readme_tables.py", "--check"]
    process = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_named_files_exist():
    text = (ROOT / "README.md").read_text()
    names = set(re.findall(r"\(((?:verl_fp16|recipes|tests|benchmarks|patches)/[\w./]+)\)", text))
    names |= set(re.findall(r"`((?:verl_fp16|scripts|benchmarks|recipes)/[\w./-]+)`", text))
    assert len(names) > 5
    assert [name for name in names if not (ROOT / name).exists()] == []
