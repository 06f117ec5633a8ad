"""The panels as pictures: SVG for the page, whose colours follow the reader's theme, and a PNG for each group."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from verl_fp16.log_entries import SKIPPED
from verl_fp16.plotting import (
    EDGE,
    FAINT,
    INK,
    MUTED,
    PAPER,
    blank_figure,
    dress,
    use_decades,
    use_powers_of_two,
)
from verl_fp16.run_report.assemble import Run
from verl_fp16.run_report.curves import COUNTED, VALIDATION, Course, Panel
from verl_fp16.run_report.thinning import default_window, running_median, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by people with any colour vision; without yellow, which no white paper shows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5609b", "#c88400", "#3d9bd6", "#000000")
DARK_COLOURS = ("#56a8e0", "#ff8b4d", "#2fc79b", "#e3a1cc", "#f0b43c", "#9ad1f5", "#ffffff")
"""The same for dark paper."""

_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)))
_THEME = {INK: "--ink", MUTED: "--muted", FAINT: "--faint", EDGE: "--edge", PAPER: "--card"}
_BUCKETS = 360
_LARGEST = 1e100
"""What is beyond it counts as not finite in a picture, and below its inverse as zero: axes there have no numbers."""

_FEW = 60
"""Points up to which each one gets a dot."""

_MOST_MARKS = 120


def colour(index: int) -> str:
    """Of the run with this number, everywhere."""
    return COLOURS[index % len(COLOURS)]


def dashes(index: int) -> Any:
    """Its style of line: where the colours are used up, they come again dashed."""
    return _DASHES[index // len(COLOURS) % len(_DASHES)]


def measured(panels: Sequence[Panel], runs: Sequence[Run]) -> list[Panel]:
    """Those of ``panels`` of which any run logged a finite number."""
    return [panel for panel in panels if any(_has_values(run.courses.get(panel.key)) for run in runs)]


def _has_values(course: Course | None) -> bool:
    return course is not None and len(course.finite.steps) > 0


def as_svg(panel: Panel, runs: Sequence[Run], window: int | None) -> str:
    """One panel as an SVG element without a size of its own; its colours are the page's ``--ink``, ``--run0``, ..."""
    import matplotlib

    # The salt makes the ids in it differ from those of the page's other pictures.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.key}):
        # Margins of one size: the panels' axes are in line on the page, and a layout that looks for the smallest ones
        # takes as long as all the drawing.
        figure = blank_figure(4.6, 2.6, layout=None)
        axes = figure.subplots(gridspec_kw={"left": 0.15, "right": 0.985, "top": 0.95, "bottom": 0.17})
        draw_panel(axes, panel, runs, window, size=8)
        axes.yaxis.set_label_coords(-0.15, 0.5)  # in line, too
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(text.getvalue(), panel)


def _for_page(svg: str, panel: Panel) -> str:
    """Without prologue, size, fonts and needless digits; with the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"(\d\.\d{2})\d+", r"\1", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="(?!m[0-9a-f]{10})[^"]*"', "<g", svg)
    for index, name in enumerate(COLOURS):
        svg = svg.replace(name, f"var(--run{index})")
    for name, variable in _THEME.items():
        svg = svg.replace(name, f"var({variable})")
    svg = re.sub(r"\n\s*", "\n", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{panel.title}, {panel.label}, over training steps"', 1)


def as_png(title: str, panels: Sequence[Panel], runs: Sequence[Run], window: int | None) -> bytes:
    """A group of panels, two to a row, with one legend."""
    rows = -(-len(panels) // 2)
    columns = min(2, len(panels))
    handles = _legend(runs, panels)
    to_a_row = 3 * columns
    legend_height = 0.3 * -(-len(handles) // to_a_row)
    width, height = 6.0 * columns, 0.7 + 3.5 * rows + legend_height
    figure = blank_figure(width, height, dpi=120, layout=None)
    figure.suptitle(
        title, x=0.15 / width, y=1 - 0.15 / height, ha="left", va="top", fontsize=16, color=INK, weight="bold"
    )
    margins = {"left": 0.85 / width, "right": 1 - 0.2 / width, "top": 1 - 1.0 / height}
    margins |= {"bottom": (0.65 + legend_height) / height, "wspace": 0.19, "hspace": 0.38}
    places = figure.subplots(rows, columns, squeeze=False, gridspec_kw=margins).flatten()
    for axes, panel in zip(places, panels, strict=False):
        draw_panel(axes, panel, runs, window, heading=panel.title)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    if handles:
        columns = min(len(handles), to_a_row)
        by_row = [handle for column in range(columns) for handle in handles[column::columns]]  # filled by column
        figure.legend(
            handles=by_row,
            loc="lower left",
            bbox_to_anchor=(0.0, 0.0),
            ncols=columns,
            frameon=False,
            fontsize=10.5,
            labelcolor=INK,
        )
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a run's name may have letters that no font here has
        figure.savefig(image, format="png")
    return image.getvalue()


def draw_panel(
    axes: Axes, panel: Panel, runs: Sequence[Run], window: int | None, *, heading: str = "", size: float = 11
) -> None:
    """Draw what ``runs`` logged of ``panel``, laid over each other.

    Args:
        window: steps of the running median; None for one that goes by the number of steps.
        heading: over the panel; "" for none.
        size: of the axes' labels, in points.
    """
    dress(axes, heading, panel.label, size)
    low, high = min(run.span[0] for run in runs), max(run.span[1] for run in runs)
    margin = max(0.5, 0.015 * (high - low))
    axes.set_xlim(low - margin, high + margin)
    shown: list[np.ndarray] = []
    for index, run in enumerate(runs):
        if _has_values(course := run.courses.get(panel.key)):
            shown.append(_draw_course(axes, course, index, window, (low, high)))
    _set_scale(axes, panel, np.concatenate(shown) if shown else np.empty(0))
    for index, run in enumerate(runs):
        if course := run.courses.get(panel.key):
            _mark_not_finite(axes, course, index)
            _mark_steps(axes, run, index)
            if panel.key == "loss_scale":
                _mark_skips(axes, run, course, index)


def _draw_course(axes: Axes, course: Course, index: int, window: int | None, span: tuple[int, int]) -> np.ndarray:
    """Draw it; return the values that are shown."""
    panel, (steps, values) = course.panel, course.series
    values = np.where(_can_be_drawn(values), values, np.nan)
    if panel.axis != "linear":
        values = np.where(values > 1 / _LARGEST, values, np.nan)
    style = {"color": colour(index), "linestyle": dashes(index), "zorder": 3, "solid_capstyle": "round"}
    if not panel.smoothed and panel.key != VALIDATION:
        style["drawstyle"] = "steps-post"
    window = default_window(len(steps)) if window is None else window
    thinned = thin(steps, values, _BUCKETS, *span)
    # Dots keep a step visible whose neighbours have no value.
    dots = {"marker": "o", "markersize": 3, "markeredgewidth": 0} if len(steps) <= _FEW else {}
    if not panel.smoothed or window <= 1:
        axes.plot(*thinned, linewidth=1.6, **(style | dots))
    else:
        axes.plot(*thinned, linewidth=0.7, alpha=0.35, **(style | dots | {"zorder": 2}))
        axes.plot(*running_median(steps, values, window), linewidth=1.8, **style)
    return thinned[1]


def _can_be_drawn(values: np.ndarray) -> np.ndarray:
    return np.abs(values) < _LARGEST  # not so of nan


def _set_scale(axes: Axes, panel: Panel, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if panel.axis == "log":
        use_decades(axes, values)
    elif panel.axis == "log2":
        use_powers_of_two(axes, values)
    elif len(values) and values.min() >= 0:
        if panel.form == COUNTED:
            axes.yaxis.get_major_locator().set_params(integer=True)
        top = float(values.max())
        axes.set_ylim(0, 1.02 if panel.key in ("reward", "validation") and 0.5 < top <= 1 else 1.1 * top or 1)


def _mark_not_finite(axes: Axes, course: Course, index: int) -> None:
    steps = course.series.steps[~_can_be_drawn(course.series.values)]
    if len(steps):
        axes.plot(
            _some(steps),
            np.full(len(_some(steps)), 0.97),
            "x",
            transform=axes.get_xaxis_transform(),
            color=colour(index),
            markersize=6,
            markeredgewidth=1.6,
            zorder=5,
            clip_on=False,
        )


def _mark_skips(axes: Axes, run: Run, course: Course, index: int) -> None:
    if SKIPPED not in run.log.series:
        return
    steps, counts = run.log.series[SKIPPED]
    skipping = _some(steps[counts > 0])
    at = np.searchsorted(course.series.steps, skipping)
    at = np.minimum(at, len(course.series.steps) - 1)
    there = course.series.steps[at] == skipping
    if not there.any():
        return
    axes.plot(
        skipping[there],
        course.series.values[at[there]],
        "X",
        color=colour(index),
        markeredgecolor=PAPER,
        markersize=6.5,
        markeredgewidth=0.8,
        zorder=4,
    )


def _mark_steps(axes: Axes, run: Run, index: int) -> None:
    for step in run.log.resumed[:_MOST_MARKS]:
        axes.axvline(step, color=colour(index), linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
    alarms = sorted({finding.step for finding in run.findings if finding.kind == "alarm"})
    if not alarms:
        return  # of a line without points, the layout would take the extent for infinite
    for step in alarms:
        axes.axvline(step, color=colour(index), linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.plot(
        alarms,
        [1.0] * len(alarms),
        "v",
        transform=axes.get_xaxis_transform(),
        color=colour(index),
        markersize=7,
        markeredgecolor=PAPER,
        markeredgewidth=0.8,
        zorder=6,
        clip_on=False,
    )


def _some(steps: np.ndarray) -> np.ndarray:
    """At most 120 of them, evenly chosen."""
    return steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MOST_MARKS)).round().astype(int))]


def _legend(runs: Sequence[Run], panels: Sequence[Panel]) -> list[Any]:
    """What the lines and the marks are; nothing for a single run without marks."""
    from matplotlib.lines import Line2D

    def mark(symbol: str, label: str) -> Line2D:
        return Line2D([], [], color=MUTED, marker=symbol, markersize=7, linestyle="none", label=label)

    lines = [
        # matplotlib reads dollars as mathematics, and leaves out a label that begins with an underscore.
        Line2D([], [], color=colour(index), linestyle=dashes(index), linewidth=2.2, label=_plain(run.name))
        for index, run in enumerate(runs)
    ]
    marks = [mark(symbol, label) for symbol, label in marks_of(runs, panels)]
    return [*(lines if len(runs) > 1 else []), *marks]


def _plain(name: str) -> str:
    shown = "".join(character if character.isprintable() else "�" for character in name).replace("$", r"\$")
    return f"\u200b{shown if len(shown) <= 60 else shown[:57] + '...'}"


def marks_of(runs: Sequence[Run], panels: Sequence[Panel]) -> list[tuple[str, str]]:
    """(matplotlib's symbol, meaning) of the marks that are in the pictures of ``panels``."""
    marks = []
    if any(finding.kind == "alarm" for run in runs for finding in run.findings):
        marks.append(("v", "first alarm of a rule"))
    if any(run.log.resumed for run in runs):
        marks.append(("$⋮$", "resumed"))
    keys = {panel.key for panel in panels}
    if "loss_scale" in keys and any(
        SKIPPED in run.log.series and (run.log.series[SKIPPED].values > 0).any() for run in runs
    ):
        marks.append(("X", "step with a skipped update"))
    shown = [course for run in runs for key, course in run.courses.items() if key in keys]
    if any(not _can_be_drawn(course.series.values).all() for course in shown):
        marks.append(("x", "not a finite number"))
    return marks
