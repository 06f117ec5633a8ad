"""The paper's figure: token probabilities of both sides, and the sequences' log-ratios over their lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verl_fp16.gap_report.analysis import Interval, Sequences

_COLOURS = ("#c8553d", "#2a78b5", "#5b8c5a", "#7d5ba6")
_BINS = 200


@dataclass(frozen=True)
class Panel:
    """What is drawn of one pair.

    Args:
        title: the pair, as it is written.
        tokens: counts of tokens by (mu, pi), each in equal bins from 0 to 1, of shape (bins, bins).
        sequences: the sequences.
        slope: with its interval.
    """

    title: str
    tokens: np.ndarray
    sequences: Sequences
    slope: Interval


def token_counts(rollout: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Tokens by (mu, pi), for :class:`Panel`; from log-probabilities of shape (tokens,); those of parts add up."""
    edges = np.linspace(0, 1, _BINS + 1)
    counts, _, _ = np.histogram2d(np.exp(np.minimum(rollout, 0)), np.exp(np.minimum(training, 0)), bins=(edges, edges))
    return counts


def draw(panels: Sequence[Panel], file: Path, title: str) -> Path:
    """Two rows, a column for each pair: the tokens, and s over L with the straight line; scales are shared by rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels), 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(panels), squeeze=False, sharey="row", sharex="row")
    most = max(1.0, *(panel.tokens.max() for panel in panels))
    for index, panel in enumerate(panels):
        top, bottom, colour = axes[0, index], axes[1, index], _COLOURS[index % len(_COLOURS)]
        shown = np.ma.masked_equal(panel.tokens.T, 0)
        mesh = top.imshow(
            shown, origin="lower", extent=(0, 1, 0, 1), norm=LogNorm(1, most), cmap="viridis", interpolation="nearest"
        )
        top.plot((0, 1), (0, 1), color="black", lw=0.6, alpha=0.5)
        top.set_title(f"{panel.title}\n{int(panel.tokens.sum()):,} tokens", fontsize=11)
        top.set_xlabel("rollout probability μ")
        _draw_sequences(bottom, panel, colour)
    axes[0, 0].set_ylabel("training probability π")
    axes[1, 0].set_ylabel("log π − log μ of the sequence, nats")
    figure.colorbar(mesh, ax=axes[0, :].tolist(), label="tokens", shrink=0.8)
    figure.suptitle(title, fontsize=12)
    figure.savefig(file, dpi=150)
    return file


def _draw_sequences(axes, panel: Panel, colour: str) -> None:
    length, s = panel.sequences.length, panel.sequences.s
    axes.axhline(0, color="black", lw=0.6, alpha=0.5)
    axes.scatter(length, s, s=8, color=colour, alpha=0.45, lw=0)
    told = "no slope: all lengths are equal"
    if np.isfinite(panel.slope.value):
        ends = np.array([length.min(), length.max()])
        axes.plot(ends, s.mean() + panel.slope.value / 1e3 * (ends - length.mean()), color="black", lw=1.4)
        told = f"slope {panel.slope.value:+.3g} [{panel.slope.low:+.3g}, {panel.slope.high:+.3g}] per 1K tokens"
    axes.set_title(told, fontsize=10)
    axes.set_xlabel("tokens of the sequence")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def table(
    measured: Mapping[str, Mapping[str, Interval]], factors: Mapping[str, Mapping[str, Interval]]
) -> list[list[str]]:
    """Rows for a terminal: pair, then each statistic, then by how much the first pair's is larger."""
    rows = []
    for name, values in measured.items():
        shown = [
            _text(values[statistic]) for statistic in ("log_prob_abs_diff_mean", "k3", "seq_kl", "slope_per_1k_tokens")
        ]
        ratio = factors.get(name)
        rows.append(
            [name, *shown, *(_text(ratio[key], ".3g") if ratio else "" for key in ("log_prob_abs_diff_mean", "k3"))]
        )
    return rows


def _text(interval: Interval, form: str = ".3g") -> str:
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
