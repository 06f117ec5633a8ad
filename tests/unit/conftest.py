"""What several modules of this tier begin with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import gap_fakes
import pytest
from gap_command import PROMPTS


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> Path:
    """A model for the command mismatch with both sides faked, and prompts for it in the current folder."""
    gap_fakes.put_in_place(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("".join(f"{number}+1=\n\n" for number in range(PROMPTS)))
    return tiny_model


_VERLS_SCORES = """
def default_compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if data_source == "sums":
        return float(solution_str == ground_truth)
    if data_source == "strict":
        return {"score": 1 / len(solution_str), "acc": solution_str == ground_truth}
    if data_source == "needs":
        import nobody_has_this
    raise NotImplementedError(f"Reward function is not implemented for {data_source=}")
"""


@pytest.fixture
def verls_scores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A verl that has nothing but scores; the folder of them."""

    def of_verl() -> list[str]:
        return [name for name in sys.modules if name == "verl" or name.startswith("verl.")]

    for name in of_verl():
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "with-verl" / "verl" / "utils" / "reward_score"
    folder.mkdir(parents=True)
    for package in (folder.parents[1], folder.parent):
        (package / "__init__.py").touch()
    (folder / "__init__.py").write_text(_VERLS_SCORES)
    (folder / "gsm8k.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "with-verl")
    yield folder
    for name in of_verl():
        del sys.modules[name]
