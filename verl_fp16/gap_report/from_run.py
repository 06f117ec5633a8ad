"""The same numbers from what a verl run has written: the evidence of its steps (:mod:`verl_fp16.mismatch.evidence`).

A run keeps the log-ratio and the length of a sample of each step's sequences, the worst tokens, and every statistic of
the step. So slope and sequence KL come with intervals; means over tokens are those of the steps, and have none; and the
tokens of the figure are the worst ones, not all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from verl_fp16.gap_report import figure
from verl_fp16.gap_report.analysis import Sequences
from verl_fp16.gap_report.errors import GapError
from verl_fp16.gap_report.results import Measured
from verl_fp16.mismatch.evidence_reading import EvidenceError, locate

NOTE = "from a run's evidence: a sample of the sequences of {steps} steps ({first} to {last}), and its worst tokens"


def read(run: Path, name: str) -> Measured:
    """All steps of a run's evidence together.

    Args:
        run: the run's checkpoint folder, or a folder of steps' evidence.

    Raises:
        GapError: there is none, or nothing in it can be read.
    """
    try:
        newest, _ = locate(run)
    except EvidenceError as error:
        if run.is_dir():
            raise GapError(
                f"{run}: there is no evidence of a run in it, which is in verl_fp16/mismatch of the run's "
                "trainer.default_local_dir. A run writes it every verl_fp16.mismatch.evidence_interval steps (100) and "
                "on alarms; without it measure the model instead: verl-fp16 mismatch MODEL --prompts FILE"
            ) from None
        raise GapError(str(error)) from None
    from verl_fp16.mismatch.evidence_files import step_folders

    steps = sorted(step_folders(newest.parent.parent), key=lambda step: step.step)
    lengths, log_ratios, counts, statistics, numbers, dtypes = [], [], 0.0, [], [], {}
    for step in steps:
        try:
            sequences, tokens = _tables(step.path)
        except EvidenceError:
            continue  # half copied, or another version's; the others count
        facts = step.facts or {}
        numbers.append(step.step)
        lengths += [row["length"] for row in sequences]
        log_ratios += [row["log_ratio"] for row in sequences]
        both = np.array([(row["log_mu"], row["log_pi"]) for row in tokens], dtype=float).reshape(-1, 2)
        both = both[np.isfinite(both).all(1)]
        counts = counts + figure.token_counts(both[:, 0], both[:, 1])
        dtypes = facts.get("dtypes") or dtypes
        statistics.append(facts.get("scalars") or {})
    if not numbers:
        raise GapError(f"{newest.parent.parent}: none of the steps in it can be read: copy the folder again")
    length, s = (np.array(values, dtype=float) for values in (lengths, log_ratios))
    unknown = np.full(len(length), np.nan)
    kept = (length > 0) & np.isfinite(s)
    found = {"training": dtypes.get("train"), "rollout": dtypes.get("rollout")} if isinstance(dtypes, dict) else {}
    note = NOTE.format(steps=len(numbers), first=numbers[0], last=numbers[-1])
    columns = Sequences(length[kept], s[kept], unknown[kept], unknown[kept], np.arange(len(length))[kept])
    return Measured(name, _over_steps(statistics), columns, counts, found, None, note)


def _tables(step: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from verl_fp16.mismatch.evidence_files import SEQUENCES, TOKENS
    from verl_fp16.mismatch.evidence_reading import read_table

    return read_table(step / SEQUENCES, SEQUENCES), read_table(step / TOKENS, TOKENS)


def _over_steps(statistics: list[dict[str, float]]) -> dict[str, float]:
    """Tokens are added up, and means over tokens weighted by them; what is not finite is text in the facts."""
    rows = [
        {name.rpartition("/")[2]: value for name, value in row.items() if isinstance(value, int | float)}
        for row in statistics
    ]
    rows = [row for row in rows if row.get("tokens")]
    total = sum(row["tokens"] for row in rows)
    found = {"tokens": float(total)}
    for name in ("log_prob_abs_diff_mean", "k3", "k1"):
        if rows and all(name in row for row in rows):
            found[name] = sum(row[name] * row["tokens"] for row in rows) / total
    return found
