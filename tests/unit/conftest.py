"""What several modules of this tier begin with."""

from __future__ import annotations

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
