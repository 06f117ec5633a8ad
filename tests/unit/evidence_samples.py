"""Evidence made by hand for the tests of its files and of the command tokens."""

from __future__ import annotations

from pathlib import Path

from verl_fp16.mismatch.evidence import Evidence, SequenceRatio, WorstToken
from verl_fp16.mismatch.evidence_files import write

CURVES = {
    "position": [{"first": 0, "last": 0, "tokens": 2.0, "k1": 0.25, "log_prob_abs_diff_mean": 0.5}],
    "length": [
        {
            "first": 2,
            "last": 2,
            "sequences": 1.0,
            "length_mean": 2.0,
            "seq_log_ratio_mean": -0.5,
            "seq_log_ratio_std": 0.0,
        }
    ],
}
FACTS = {
    "dtypes": {"training": "bfloat16", "rollout": "float16"},
    "scalars": {"k3": 1e-4},
    "alarms": ["k3 is 12 times its median"],
}


def token(number: int = 0, **other) -> WorstToken:
    """One whose gap falls with its number."""
    fields = {
        "rank": 0,
        "row": number,
        "sample_id": f"sample-{number}",
        "position": 10 + number,
        "length": 40 - number,
        "token_id": 65 + number % 26,
        "before": [98, 99],
        "after": [100],
        "log_mu": -0.5,
        "log_pi": -0.5 - 1 / (number + 1),
    }
    return WorstToken(**{**fields, **other})


def evidence(*tokens: WorstToken, sequences: int = 3, seen: int | None = None) -> Evidence:
    kept = [SequenceRatio(0, row, f"sample-{row}", 40 - row, -0.5 * row) for row in range(sequences)]
    return Evidence(64, 64, list(tokens), kept, 1000, sequences if seen is None else seen)


def decode(ids: list[int]) -> str:
    """A tokenizer of bytes, whose ids end at 255."""
    return bytes(ids).decode(errors="replace")


def written(folder: Path, step: int = 7, *tokens: WorstToken, of: Evidence | None = None, **other) -> Path:
    given = {"decode": decode, "curves": CURVES, "facts": FACTS, "keep": 100, **other}
    return write(folder, step, of or evidence(*(tokens or (token(0), token(1)))), **given)
