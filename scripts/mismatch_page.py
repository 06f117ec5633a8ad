#!/usr/bin/env python3
"""Write the tables of docs/mismatch.md: the statistics with their definitions; what verl's numbers and ours make of one
batch and of six faults planted in it. verl's are computed by verl's own functions, as the trainers call them.

python scripts/mismatch_page.py [--check]
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("VERL_PLATFORM", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from verl_fp16.mismatch.definitions import STATISTICS  # noqa: E402
from verl_fp16.mismatch.statistics import GapStatistics  # noqa: E402

PAGE = ROOT / "docs" / "mismatch.md"
ROWS, POSITIONS, GAP = 64, 1024, 1e-3
VERL = (
    "training/rollout_probs_diff_mean",
    "training/rollout_probs_diff_max",
    "training/rollout_actor_probs_pearson_corr",
    "rollout_corr/kl",
    "rollout_corr/k3_kl",
    "rollout_corr/training_ppl",
    "rollout_corr/log_ppl_abs_diff",
    "rollout_corr/chi2_token",
    "rollout_corr/chi2_seq",
)
OURS = (
    "k1",
    "k3",
    "log_prob_abs_diff_mean",
    "log_prob_abs_diff_p99",
    "log_prob_abs_diff_max",
    "prob_diff_min",
    "prob_pearson",
    "seq_log_ratio_std",
    "slope_per_1k_tokens",
    "slope_per_1k_tokens_se",
    "token_ess",
    "tokens",
    "empty_rows",
    "nonfinite_rollout",
)


class Batch(SimpleNamespace):
    """log mu, log pi and mask, each of shape (ROWS, POSITIONS)."""


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(POSITIONS // 8, POSITIONS, (ROWS, 1), generator=generator)
    # Of most tokens the policy is nearly certain, as of text.
    training = -torch.rand(ROWS, POSITIONS, generator=generator).pow(4).mul(6)
    rollout = training + GAP * torch.randn(ROWS, POSITIONS, generator=generator)
    mask = (torch.arange(POSITIONS) < lengths).long()
    return Batch(rollout=rollout * mask, training=training * mask, mask=mask)


def infinite_token(batch: Batch) -> None:
    batch.rollout[3, 5] = -math.inf


def nan_row(batch: Batch) -> None:
    batch.rollout[3] = math.nan


def empty_row(batch: Batch) -> None:
    batch.mask[3] = 0


def outlier(batch: Batch) -> None:
    batch.rollout[3, 5] = -0.01
    batch.training[3, 5] = -25.0


def growing_bias(batch: Batch) -> None:
    batch.training -= 0.005 * batch.mask


def shifted_mask(batch: Batch) -> None:
    batch.mask = torch.roll(batch.mask, 1, dims=1)
    batch.mask[:, 0] = 0


FAULTS: Mapping[str, Callable[[Batch], None] | None] = {
    "as it is": None,
    "one token of -inf": infinite_token,
    "a row of NaN": nan_row,
    "an empty row": empty_row,
    "one outlier": outlier,
    "bias of 0.005 a token": growing_bias,
    "mask shifted by one": shifted_mask,
}


def measure(batch: Batch) -> dict[str, float]:
    """What verl and this package log of ``batch``."""
    from verl.trainer.ppo.rollout_corr_helper import compute_offpolicy_metrics
    from verl.utils.debug.metrics import calculate_debug_metrics

    tensors = {"rollout_log_probs": batch.rollout, "old_log_probs": batch.training, "response_mask": batch.mask}
    found = calculate_debug_metrics(SimpleNamespace(batch={**tensors, "responses": batch.mask}))
    corrections = compute_offpolicy_metrics(batch.training, batch.rollout, batch.mask)
    found |= {f"rollout_corr/{name}": value for name, value in corrections.items()}
    ours = GapStatistics()
    ours.add(batch.rollout, batch.training, batch.mask)
    return found | ours.scalars()


def statistics_table() -> str:
    lines = ["| `mismatch/...` | what it is | defined or logged by |", "|---|---|---|"]
    for statistic in STATISTICS:
        cells = (f"`{statistic.name}`", statistic.definition, statistic.source)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def faults_table() -> str:
    columns = {}
    for name, fault in FAULTS.items():
        batch = make_batch()
        if fault:
            fault(batch)
        columns[name] = measure(batch)
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    clean = columns["as it is"]
    for name in (*VERL, *OURS):
        cells = (_cell(found.get(name), clean.get(name), found is clean) for found in columns.values())
        label = f"`{name}`" if "/" in name else f"`mismatch/{name}`"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, clean: float | None, is_clean: bool) -> str:
    """Three digits; bold where a fault moved the number by more than a quarter."""
    if value is None:
        return "-"
    text = f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.3g}"
    same = clean is not None and math.isclose(value, clean, rel_tol=0.25, abs_tol=1e-12)
    return text if is_clean or same else f"**{text}**"


def cost_table() -> str:
    """What the statistics cost, from ``mismatch-metrics-cpu.json``."""
    result = json.loads((ROOT / "benchmarks" / "results" / "mismatch-metrics-cpu.json").read_text())
    time, memory = result["time"], result["memory"]
    low, high = time["ratio_quartiles"]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "verl"))
    lines = ["| | time, s | extra memory, MB |", "|---|---|---|"]
    for side, name in (("ours", "this package, all statistics"), ("verl", "verl's two functions")):
        lines.append(f"| {name} | {time['seconds'][side]:.2f} | {memory[side]['extra_bytes'] / 1e6:.0f} |")
    sizes = ", ".join(
        f"{row['tokens'] / 2**20:.0f} M tokens {row['seconds']:.2f} s and {row['extra_bytes'] / 1e6:.0f} MB"
        for row in result["sizes"]
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Ratio {time['ratio']:.2f} [quartiles {low:.2f}, {high:.2f}], of noise {time['ratio_of_noise']:.2f}; "
            f"{time['pairs']} pairs, {result['rows']} x {result['positions']} float32, ragged, {time['tokens']:,} "
            f"tokens. By size, without padding: {sizes}. {result['date']}, {result['machine']}; {versions}.",
        ]
    )


TABLES = {"statistics": statistics_table, "faults": faults_table, "cost": cost_table}


def render(text: str) -> str:
    for name, table in TABLES.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        block = re.compile(f"{begin}.*?{end}", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"docs/mismatch.md has no block {begin} ... {end}")
        content = f"{begin}\n{table()}\n{end}"
        text = block.sub(lambda _, content=content: content, text)
    return text


def main() -> int:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # sums in float32 depend on how they are split
    before = PAGE.read_text()
    after = render(before)
    if "--check" in sys.argv[1:]:
        if after != before:
            print("docs/mismatch.md is stale: run scripts/mismatch_page.py", file=sys.stderr)
        return int(after != before)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
