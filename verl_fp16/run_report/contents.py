"""What a report says, in rows and sentences, whatever it is written in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl_fp16.run_report.assemble import Run
from verl_fp16.run_report.curves import GROUPS, PANELS, Panel, Point, written
from verl_fp16.run_report.figures import measured
from verl_fp16.run_report.findings import COLLAPSE_STEPS, LOOKED_FOR

COLUMNS = ("metric", "run", "first", "last", "best", "at step")


@dataclass(frozen=True)
class Row:
    """Of the table: a run's numbers of a panel; ``best`` is None where no value is better than another."""

    panel: Panel
    run: Run
    index: int
    metric: str
    first: Point
    last: Point
    best: Point | None

    def cells(self) -> tuple[str, ...]:
        """In the order of :data:`COLUMNS`."""
        form = self.panel.form
        best = ("-", "-") if self.best is None else (written(self.best.value, form), f"{self.best.step:,}")
        return (
            self.panel.title,
            self.run.name,
            written(self.first.value, form),
            written(self.last.value, form),
            *best,
        )


def rows(runs: Sequence[Run]) -> list[Row]:
    """A row for each panel and each run that logged a finite number of it."""
    found = []
    for panel in PANELS:
        for index, run in enumerate(runs):
            course = run.courses.get(panel.key)
            first, last = (course.first(), course.last()) if course else (None, None)
            if course and first and last:
                found.append(Row(panel, run, index, course.metric, first, last, course.best()))
    return found


def unit_and_direction(panel: Panel) -> str:
    """Of a metric in the table."""
    better = {"larger": "larger is better", "smaller": "smaller is better", "nearer 0": "best is nearest to 0"}
    return panel.label + (f"; {better[panel.better]}" if panel.better else "")


def unmeasured(runs: Sequence[Run]) -> str:
    """The panels that no run logged, in a sentence; "" where there is none."""
    missing = [panel.title for panel in PANELS if panel not in measured(PANELS, runs)]
    return f"Not logged by any run: {', '.join(missing)}." if missing else ""


def remark(panel: Panel, runs: Sequence[Run]) -> str:
    """Which metric a panel shows; where runs differ in it, which one of which run."""
    metrics: dict[str, list[str]] = {}
    for run in runs:
        if course := run.courses.get(panel.key):
            metrics.setdefault(course.metric, []).append(run.name)
    if len(metrics) == 1:
        return next(iter(metrics))
    return "; ".join(f"{metric} ({', '.join(names)})" for metric, names in metrics.items())


def facts(run: Run) -> list[tuple[str, str]]:
    """What is known of a run: label, text."""
    first, last = run.span
    found = [("log", str(run.place.log)), ("steps", _steps(run, first, last))]
    if run.seconds is not None:
        found.append(("time", f"{duration(run.seconds)} in training steps"))
    found += _settings(run)
    if run.dtypes:
        found.append(("dtypes as read back", ", ".join(f"{side} {dtype}" for side, dtype in run.dtypes.items())))
    if run.evidence.versions:
        versions = ", ".join(f"{name} {version}" for name, version in run.evidence.versions.items())
        found.append(("versions", versions))
    newest = {skip.role: skip for skip in run.evidence.skips}
    for role, number in run.skips.items():
        told = f". The newest on record: {newest[role].newest}" if role in newest else ""
        found.append((f"skipped updates, {role}", f"{number:,}{told}"))
    if run.place.evidence:
        found.append(("evidence", str(run.place.evidence)))
    return found


def _steps(run: Run, first: int, last: int) -> str:
    planned = f" of {run.evidence.planned:,}" if run.evidence.planned else ""
    logged = f"{len(run.log.steps):,} logged, from {first:,} to {last:,}{planned}"
    if run.log.resumed:
        logged += f"; resumed from {', '.join(f'{step:,}' for step in run.log.resumed[:8])}"
    return logged


def _settings(run: Run) -> list[tuple[str, str]]:
    declared = run.evidence.declared
    found = []
    if declared.get("train_dtype"):
        found.append(("declared", f"training {declared['train_dtype']}, rollout {declared.get('rollout_dtype')}"))
    scale = declared.get("loss_scale")
    if isinstance(scale, dict) and run.skips:
        shown = ("mode", "init", "growth_interval", "min", "max")
        found.append(("loss scaler", ", ".join(f"{name} {_short(scale[name])}" for name in shown if name in scale)))
    watch = declared.get("mismatch")
    if isinstance(watch, dict) and "on_alarm" in watch:
        found.append(("on an alarm", str(watch["on_alarm"])))
    return found


def _short(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:,.10g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def duration(seconds: float) -> str:
    """In the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


TOKEN_COLUMNS = ("gap", "log μ", "log π", "position", "token in context")


_CONTEXT = 80


def tokens_heading(run: Run) -> str:
    step = run.evidence.tokens[0]["step"]
    return f"The tokens with the largest gap, at step {step:,}"


def token_cells(token: Any) -> tuple[str, str, str, str, tuple[str, str, str]]:
    """In the order of :data:`TOKEN_COLUMNS`; the last cell is before, token, after."""
    return (
        written(token["log_ratio"], "+#.4g"),
        written(token["log_mu"], "#.4g"),
        written(token["log_pi"], "#.4g"),
        f"{token['position']:,} of {token['length']:,}",
        (token["before"][-_CONTEXT:], token["text"][:_CONTEXT], token["after"][:_CONTEXT]),
    )


def printable(text: str) -> str:
    """With escapes, as in Python, for what would not be seen or could turn the text around."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def nothing_found(runs: Sequence[Run]) -> str:
    return f"Nothing was found in {'this run' if len(runs) == 1 else 'these runs'}. Looked for: {LOOKED_FOR}."


def explanation(window: int | None) -> list[str]:
    """What has to be known to read the pictures and the table."""
    drawn = (
        "the thick line is the running median over a twenty-fifth of the run's steps"
        if window is None
        else f"the thick line is the running median over {window:,} steps"
    )
    return [
        "First, last and best are single values as logged, of the steps with a finite one.",
        f"In panels of more than 60 steps {drawn}, the faint one is what was logged; of many steps it has the lowest "
        "and the highest in each part.",
        f"A reward has collapsed where its mean over {COLLAPSE_STEPS} steps falls below half of the best such mean "
        "before it, and by more than five standard errors.",
        "π is the training policy, μ the rollout policy, |Δ log p| = |log π − log μ| of a sampled token.",
    ]


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """The table and the findings; what is not finite is text."""
    return {
        "runs": [
            {
                "name": run.name,
                "log": str(run.place.log),
                "first_step": run.span[0],
                "last_step": run.span[1],
                "seconds": run.seconds,
                "dtypes": run.dtypes,
                "skipped": run.skips,
                "metrics": {
                    row.panel.key: {
                        "metric": row.metric,
                        "unit": row.panel.label,
                        "better": row.panel.better or None,
                        **{name: _point(getattr(row, name)) for name in ("first", "last", "best")},
                    }
                    for row in rows([run])
                },
                "findings": [finding._asdict() for finding in run.findings],
                "notes": run.notes,
            }
            for run in runs
        ]
    }


def _point(point: Point | None) -> dict[str, Any] | None:
    if point is None:
        return None
    return {"step": point.step, "value": point.value if math.isfinite(point.value) else str(point.value)}


def groups(runs: Sequence[Run]) -> list[tuple[str, list[Panel]]]:
    """Each group with the panels that any run measured; without the groups that have none."""
    found = [(title, measured(panels, runs)) for title, panels in GROUPS.items()]
    return [(title, panels) for title, panels in found if panels]
