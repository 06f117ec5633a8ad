"""The paper's figure: token probabilities of both sides, and the sequences' log-ratios over their lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verl_fp16.gap_report.analysis import Interval, Sequences

_COLOURS = ("#c8553d", "#2a78b5", "#5b8c5a", "#7d5ba6")
_OF_TRAINING = {"bf16": _COLOURS[0], "fp16": _COLOURS[1], "fp32": "#777777"}
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


def draw_ladder(
    intervals: Mapping[str, Mapping[str, Interval]], statistics: Sequence[tuple[str, str]], file: Path, title: str
) -> Path:
    """A row for each measurement, a panel for each statistic (name, label), logarithmic, with intervals.

    Args:
        intervals: by names that begin with the precision of training.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(intervals)
    figure = Figure(figsize=(4.0 * len(statistics) + 2.6, 0.42 * len(names) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(statistics), squeeze=False, sharey=True)[0]
    for axis, (statistic, label) in zip(axes, statistics, strict=True):
        for place, name in enumerate(names):
            interval = intervals[name][statistic]
            if interval.value > 0:
                colour = _OF_TRAINING[name[:4]]
                axis.plot((max(interval.low, 1e-300), interval.high), (place, place), color=colour, lw=2, alpha=0.6)
                axis.plot(interval.value, place, "o", color=colour, ms=6)
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(axis="both", color="#dddddd", lw=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    dots = [
        axes[0].plot([], [], "o", color=colour, label=f"{name} training")[0] for name, colour in _OF_TRAINING.items()
    ]
    figure.legend(handles=dots, loc="outside lower center", ncols=len(dots), frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(file, dpi=150)
    return file


def written(interval: Interval, form: str = ".3g") -> str:
    """``1.2 [1.1, 1.3]``; without the interval where none is known, and a dash where nothing is."""
    if np.isnan(interval.value):
        return "-"
    if np.isnan(interval.low):
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
