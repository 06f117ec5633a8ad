"""What a quickstart run achieved: numbers, a figure and a short table from verl's file logger.

The logger writes one entry per line while the run goes on; see :mod:`verl_fp16.log_entries`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_fp16.log_entries import (
    ENTROPY,
    LOSS_SCALE,
    REWARD,
    SKIPPED,
    STEP_SECONDS,
    VERLS_GAP,
    as_number,
    parse_entry,
)
from verl_fp16.plotting import (
    INK,
    blank_figure,
    dress,
    say_not_measured,
    use_decades,
    use_powers_of_two,
)
from verl_fp16.whole_files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["StepMetrics", "draw", "parse_line", "read_metrics", "summarise", "table", "validation", "write_summary"]

GAP = VERLS_GAP
LOG_PPL_ABS_DIFF = "rollout_corr/log_ppl_abs_diff"


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step; step 0 is the validation before training."""

    step: int
    data: dict[str, float] = field(default_factory=dict)

    def get(self, name: str) -> float | None:
        """A metric's value, NaN and infinity included, or None if this step has none."""
        return self.data.get(name)

    @property
    def trained(self) -> bool:
        """Whether a training step was logged, rather than a validation alone."""
        return self.step > 0 and any(not name.startswith("val-") for name in self.data)


def parse_line(line: str | bytes) -> StepMetrics | None:
    """Read one line of the file logger; None for anything else, such as a line that is not fully written yet."""
    entry = parse_entry(line)
    if entry is None:
        return None
    step, values = entry
    data = {name: number for name, value in values.items() if (number := as_number(value)) is not None}
    return StepMetrics(step, data)


def read_metrics(path: str | os.PathLike[str]) -> list[StepMetrics]:
    """Read a file logger's file, one entry a step in rising order; a missing file gives an empty list."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    merged: dict[int, StepMetrics] = {}
    for entry in filter(None, map(parse_line, lines)):
        before = merged.get(entry.step)
        merged[entry.step] = StepMetrics(entry.step, {**before.data, **entry.data}) if before else entry
    return [merged[step] for step in sorted(merged)]


def validation(entry: StepMetrics) -> float | None:
    """Validation accuracy (0 to 1, one sample a question), the plain mean over data sources; None if not measured."""
    values = [v for k, v in entry.data.items() if k.startswith("val-core/") and k.endswith("/acc/mean@1")]
    return math.fsum(values) / len(values) if values else None


def _finite(metrics: Sequence[StepMetrics], name: str) -> list[float]:
    values = (entry.get(name) for entry in metrics if entry.step > 0)
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _standard_error(p: float | None, n: int | None) -> float | None:
    return math.sqrt(p * (1 - p) / n) if p is not None and n and 0 <= p <= 1 else None


def summarise(
    metrics: Sequence[StepMetrics],
    *,
    n_validation: int | None = None,
    seconds: float | None = None,
    log_prob_key: str | None = None,
) -> dict[str, Any]:
    """Reduce a run to the numbers that are reported.

    Args:
        metrics: entries of `read_metrics`.
        n_validation: number of validation questions, for the standard errors.
        seconds: wall-clock time of the run; None takes the sum of the steps' own times.
        log_prob_key: metric with the mean over tokens of |log p_train - log p_rollout|, if the run logs one.

    Returns:
        A flat dictionary; None where the run has no such number. Means leave out steps that are not finite, and
        `gap_not_finite` counts those of the gap. `log_ppl_abs_diff_mean` is the mean over sequences of
        |mean log p_rollout - mean log p_train|, in nats: differences within one sequence can cancel, so it is no mean
        over tokens.
    """
    trained = [entry for entry in metrics if entry.trained]
    before = next((validation(entry) for entry in metrics if entry.step == 0), None)
    later = [(entry.step, validation(entry)) for entry in metrics if entry.step > 0 and validation(entry) is not None]
    after_step, after = later[-1] if later else (None, None)
    entropy = [entry.get(ENTROPY) for entry in trained if entry.get(ENTROPY) is not None]
    scale = [entry.get(LOSS_SCALE) for entry in trained if entry.get(LOSS_SCALE) is not None]
    gap = [entry.get(GAP) for entry in trained if entry.get(GAP) is not None]
    skipped = _finite(metrics, SKIPPED)
    if seconds is None:
        seconds = next((math.fsum(values) for name in STEP_SECONDS if (values := _finite(metrics, name))), None)
    return {
        "steps": trained[-1].step if trained else 0,
        "seconds": seconds,
        "accuracy_before": before,
        "accuracy_before_standard_error": _standard_error(before, n_validation),
        "accuracy_after": after,
        "accuracy_after_standard_error": _standard_error(after, n_validation),
        "accuracy_after_step": after_step,
        "n_validation": n_validation,
        "prob_gap_mean": _mean(_finite(metrics, GAP)),
        "gap_not_finite": sum(not math.isfinite(value) for value in gap),
        "log_prob_gap_mean": _mean(_finite(metrics, log_prob_key)) if log_prob_key else None,
        "log_ppl_abs_diff_mean": _mean(_finite(metrics, LOG_PPL_ABS_DIFF)),
        "entropy_first": entropy[0] if entropy else None,
        "entropy_last": entropy[-1] if entropy else None,
        "loss_scale_last": scale[-1] if scale else None,
        "skipped_steps": int(sum(skipped)) if skipped else None,
    }


def _strict(value: Any) -> Any:
    """Replace what JSON has no number for by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def write_summary(path: str | os.PathLike[str], summary: Mapping[str, Any]) -> Path:
    """Write a summary as strict JSON (NaN and infinity as null), whole or not at all; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_strict(summary), indent=2, allow_nan=False) + "\n"
    write_whole(path, text.encode())
    return path


def _text(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else str(value)


def table(summary: Mapping[str, Any], *, title: str | None = None) -> Table:
    """The short table that ends a run, for a rich console."""
    from rich.table import Table

    def accuracy(when: str) -> str:
        error = summary.get(f"accuracy_{when}_standard_error")
        return _text(summary.get(f"accuracy_{when}"), ".1%") + (f" ± {error:.1%}" if error is not None else "")

    seconds = summary.get("seconds")
    rows = [
        ("validation accuracy", f"{accuracy('before')} → {accuracy('after')}"),
        ("mean |π − μ| per token", _text(summary.get("prob_gap_mean"), ".2e")),
        ("mean |Δ log p| per token", _text(summary.get("log_prob_gap_mean"), ".2e")),
        ("mean |Δ log-perplexity| per sequence", _text(summary.get("log_ppl_abs_diff_mean"), ".2e")),
        (
            "entropy, nats",
            f"{_text(summary.get('entropy_first'), '.3f')} → {_text(summary.get('entropy_last'), '.3f')}",
        ),
        ("loss scale at the end", _text(summary.get("loss_scale_last"), ",.10g")),
        ("skipped steps", f"{_text(summary.get('skipped_steps'), 'd')} of {summary.get('steps', 0)}"),
        ("time", "-" if seconds is None else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"),
    ]
    result = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    result.add_column(style="dim")
    result.add_column(justify="right", style="bold")
    for name, value in rows:
        if name != "mean |Δ log p| per token" or value != "-":
            result.add_row(name, value)
    return result


def draw(metrics: Sequence[StepMetrics], path: str | os.PathLike[str], title: str) -> Path:
    """Draw the course of a run as a PNG of 1800 x 1200 pixels with four panels; returns the path.

    A step whose value is missing or not finite leaves a gap in its line; a panel without any value says so.
    """
    indigo, amber, teal, violet, red = "#4353c9", "#d97706", "#0f8b8d", "#7c4fb5", "#d1344b"
    figure = blank_figure(12, 8)
    figure.get_layout_engine().set(w_pad=0.16, h_pad=0.12, wspace=0.03, hspace=0.05)
    figure.suptitle(title, x=0.012, ha="left", fontsize=17, fontweight="bold", color=INK)
    (reward_axes, gap_axes), (entropy_axes, scale_axes) = figure.subplots(2, 2)

    def series(name: str) -> tuple[list[int], list[float]]:
        rows = [(entry.step, entry.get(name)) for entry in metrics if entry.trained]
        return [step for step, _ in rows], [math.nan if value is None else value for _, value in rows]

    def line(axes: Any, steps: list[int], values: list[float], color: str, **style: Any) -> None:
        # A marker keeps a step visible whose neighbours have no value.
        dots = {"marker": "o", "markersize": 4 if len(steps) <= 60 else 2.5, "markeredgewidth": 0, "clip_on": False}
        if any(map(math.isfinite, values)):
            axes.plot(steps, values, color=color, linewidth=2, **(dots | style))

    steps, reward = series(REWARD)
    checks = [(entry.step, value) for entry in metrics if (value := validation(entry)) is not None]
    line(reward_axes, steps, reward, indigo, label="reward in training")
    if checks:
        style = {"linestyle": (0, (4, 2)), "marker": "D", "markersize": 8, "markeredgewidth": 1.5}
        line(
            reward_axes,
            *map(list, zip(*checks, strict=True)),
            amber,
            markeredgecolor="white",
            label="validation",
            **style,
        )

    steps, gap = series(GAP)
    line(gap_axes, steps, [value if value > 0 else math.nan for value in gap], teal)
    steps, entropy = series(ENTROPY)
    line(entropy_axes, steps, entropy, violet)

    steps, scale = series(LOSS_SCALE)
    scale = [value if value > 0 else math.nan for value in scale]
    line(scale_axes, steps, scale, indigo, drawstyle="steps-post", marker="", label="loss scale")
    count = dict(zip(*series(SKIPPED), strict=True))
    skips = [(step, value) for step, value in zip(steps, scale, strict=True) if count.get(step, 0.0) > 0]
    for step, _ in skips:
        scale_axes.axvline(step, color=red, linewidth=1, alpha=0.35, zorder=1)
    if skips:
        xs, ys = zip(*skips, strict=True)
        label = f"skipped step ({sum(count[step] for step in xs):.0f})"
        scale_axes.plot(
            xs, ys, "X", color=red, markersize=9, markeredgecolor="white", label=label, zorder=4, clip_on=False
        )

    last = max([entry.step for entry in metrics], default=1)
    panels = (
        (
            reward_axes,
            "Reward and validation accuracy",
            "mean reward, accuracy (0 to 1)",
            [*reward, *dict(checks).values()],
        ),
        (gap_axes, "Gap between rollout and training", "mean |π − μ| per token (probability)", gap),
        (entropy_axes, "Entropy of the policy", "entropy per token (nats)", entropy),
        (scale_axes, "Loss scale", "loss scale (factor, log2 axis)", scale),
    )
    for axes, heading, label, values in panels:
        shown = [value for value in values if math.isfinite(value)]
        dress(axes, heading, label)
        axes.set_xlim(-0.02 * last, 1.02 * last)
        if not shown:
            say_not_measured(axes)
        if shown and min(shown) >= 0:
            axes.set_ylim(0, 1 if axes is reward_axes and max(shown) <= 1 else max(shown) * 1.1 or 1)
    use_decades(gap_axes, gap)
    use_powers_of_two(scale_axes, scale)
    for axes in (reward_axes, scale_axes):
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=10.5, labelcolor=INK, loc="best")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
