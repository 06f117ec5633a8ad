"""Fewer points that look the same, and the running median. numpy."""

from __future__ import annotations

import numpy as np


def thin(steps: np.ndarray, values: np.ndarray, buckets: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest value of each of ``buckets`` equal parts of [low, high], in the order of their steps.

    A spike of one step stays as high as it is. A part all of whose values are nan keeps one, which leaves a gap in the
    line.

    Args:
        steps: rising, of shape (n,).
        values: of shape (n,); infinite ones count as nan.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    if len(steps) <= 2 * buckets:
        return steps, values
    edges = np.searchsorted(steps, np.linspace(low, high, buckets + 1)[1:-1])
    starts = np.unique(np.concatenate([[0], edges, [len(steps)]]))
    kept: list[int] = []
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        part = values[start:end]
        finite = np.flatnonzero(~np.isnan(part))
        if len(finite):
            of_finite = part[finite]
            extremes = sorted({int(of_finite.argmin()), int(of_finite.argmax())})
            kept.extend((start + finite[extremes]).tolist())
        else:
            kept.append(int(start))
    index = np.asarray(kept)
    return steps[index], values[index]


def default_window(points: int) -> int:
    """Steps of the running median, odd: a twenty-fifth of the run; 1, which is none, where a run has few points."""
    return 1 if points <= 60 else max(5, points // 25) | 1


def running_median(
    steps: np.ndarray, values: np.ndarray, window: int, most: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """The median of the ``window`` values around each of at most ``most`` of the points; at the ends, of fewer.

    Values that are not finite are left out.
    """
    kept = np.isfinite(values)
    steps, values = steps[kept], values[kept]
    if not len(steps):
        return steps, values
    centres = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    half = window // 2
    medians = [np.median(values[max(0, centre - half) : centre + half + 1]) for centre in centres]
    return steps[centres], np.asarray(medians)
