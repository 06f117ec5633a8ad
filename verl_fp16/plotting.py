"""The look that the pictures share: colours, axes, scales. matplotlib is imported when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT, EDGE, PAPER = "#1f2430", "#6b7280", "#e5e7eb", "#c4c9d2", "#ffffff"

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def blank_figure(width: float, height: float, dpi: int = 150, layout: str | None = "constrained") -> Figure:
    """A figure of so many inches, which neither uses nor changes the process' own backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor=PAPER, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, heading: str, label: str, size: float = 11) -> None:
    """Name the axes of a panel over training steps, and leave away what carries no information.

    Args:
        heading: of the panel; "" for none.
        label: of the vertical axis, with its unit.
        size: of the axes' labels, in points.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    if heading:
        axes.set_title(heading, loc="left", fontsize=size + 2, fontweight="bold", color=INK, pad=10)
    axes.set_ylabel(label, fontsize=size, color=MUTED)
    axes.set_xlabel("training step", fontsize=size, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=size - 0.5, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(EDGE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def say_not_measured(axes: Axes) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=MUTED, fontsize=13)


def use_decades(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis over whole decades, so that there are always two labels to read a value from.

    Args:
        values: what is shown; only the finite and positive ones count. Where there is none, the axis stays as it is.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    shown = [value for value in values if math.isfinite(value) and value > 0]
    if not shown:
        return
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown) * 1.01))
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 10.0**high)
    axes.yaxis.set_major_locator(
        FixedLocator([10.0**exponent for exponent in range(low, high + 1, max(1, (high - low) // 5))])
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power(10, round(math.log10(value)))))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)
    if high - low <= 2:
        axes.grid(axis="y", which="minor", color=FAINT, linewidth=0.5, alpha=0.7)
    else:
        axes.yaxis.set_minor_locator(NullLocator())


def use_powers_of_two(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis with powers of two; ``values`` as in :func:`use_decades`."""
    from matplotlib.ticker import FuncFormatter

    exponents = [round(math.log2(value)) for value in values if math.isfinite(value) and value > 0]
    if not exponents:
        return
    low, high = min(exponents) - 1, max(exponents) + 1
    axes.set_yscale("log", base=2)
    axes.set_ylim(2.0**low, 2.0**high)
    axes.set_yticks([2.0**exponent for exponent in range(low, high + 1, max(1, (high - low) // 7))])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power(2, round(math.log2(value)))))
    axes.minorticks_off()


def power(base: int, exponent: int) -> str:
    """2, 16 -> 2¹⁶."""
    return f"{base}{str(exponent).translate(_SUPERSCRIPTS)}"
