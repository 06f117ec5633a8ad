"""Live display of a training run, fed by verl's file logger.

On a terminal it is a panel that redraws in place; elsewhere (a pipe, a CI log) one plain line per step and per stage.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from verl_fp16.quickstart.report import (
    ENTROPY,
    GAP,
    LOSS_SCALE,
    REWARD,
    SKIPPED,
    STEP_SECONDS,
    StepMetrics,
    parse_line,
    validation,
)

__all__ = ["MetricsTail", "RunDisplay", "clock", "number"]

_RECENT_STEPS = 8
_BARS = "▁▂▃▄▅▆▇█"


class MetricsTail:
    """Reads what a growing metrics file gained since the last look; a line counts once its end is written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._offset = 0

    def read(self) -> list[StepMetrics]:
        """Return the entries of the lines completed since the last call; none while the file is missing."""
        try:
            with open(self._path, "rb") as file:
                # The logger truncates its file when it starts.
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [entry for line in complete.splitlines() if (entry := parse_line(line)) is not None]


def number(value: float | None, form: str = ".3f") -> str:
    """Format a metric: "-" if missing, "nan" or "inf" as such."""
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else str(value)


def clock(seconds: float | None) -> str:
    """Format a duration in seconds as m:ss or h:mm:ss; "-" if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class RunDisplay:
    """Shows stage, step, metrics and time of a run; a context manager whose `tick` is called about twice a second.

    Args:
        metrics_path: file of verl's file logger; it need not exist yet.
        total_steps: training steps of the run.
        stage: first stage, such as "1/3 base model".
        training_stage: stage to change to once the first metrics are there, such as "3/3 GRPO".
        estimate_s: expected seconds of the whole run, for the time left until the first step is done.
        title: heading of the panel.
        console: rich console; the default one if None.
        now: monotonic clock in seconds.
    """

    def __init__(
        self,
        metrics_path: str | os.PathLike[str],
        total_steps: int,
        *,
        stage: str = "",
        training_stage: str | None = None,
        estimate_s: float | None = None,
        title: str = "training",
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        self.step = 0
        self._tail = MetricsTail(metrics_path)
        self._total = total_steps
        self._stage = ""
        self._first_stage = stage
        self._training_stage = training_stage
        self._estimate_s = estimate_s
        self._title = title
        self._now = now
        self._started = now()
        self._step_at: float | None = None
        self._durations: list[float] = []
        self._last: dict[str, float | None] = {}
        self._rewards: list[float] = []
        self._skipped: float | None = None
        self._accuracy: list[float] = []
        self._live: Live | None = None

    def __enter__(self) -> RunDisplay:
        self._started = self._now()
        if self.console.is_terminal:
            # Redrawn by tick() alone: no thread runs beside the one that starts and ends processes.
            self._live = Live(console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
        if self._first_stage:
            self.set_stage(self._first_stage)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tick()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def set_stage(self, stage: str) -> None:
        """Change the stage that is shown; the same one again changes nothing."""
        if stage == self._stage:
            return
        self._stage = stage
        if self._live is None:
            self._print(f"[{stage}] elapsed {clock(self.elapsed_s)}, left {self._left_text()}")
        else:
            self._redraw()

    def tick(self) -> None:
        """Take in new metrics and show them."""
        for entry in self._tail.read():
            self._take(entry)
            if self._training_stage is not None:
                self.set_stage(self._training_stage)
            if self._live is None:
                self._print(self._line())
        self._redraw()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the display was entered."""
        return self._now() - self._started

    @property
    def left_s(self) -> float | None:
        """Expected seconds to the end, from the median of recent steps, or from the estimate before the first one."""
        if self.step >= self._total:
            return 0.0
        if self._durations and self._step_at is not None:
            median = statistics.median(self._durations[-_RECENT_STEPS:])
            return max(0.0, (self._total - self.step) * median - (self._now() - self._step_at))
        return None if self._estimate_s is None else max(0.0, self._estimate_s - self.elapsed_s)

    def _take(self, entry: StepMetrics) -> None:
        now = self._now()
        accuracy = validation(entry)
        if accuracy is not None:
            self._accuracy.append(accuracy)
        if not entry.trained:
            return
        told = next((value for name in STEP_SECONDS if (value := entry.get(name)) is not None), math.nan)
        if math.isfinite(told) and told > 0:
            self._durations.append(told)
        elif self._step_at is not None and entry.step > self.step:
            self._durations.append((now - self._step_at) / (entry.step - self.step))
        self.step, self._step_at = entry.step, now
        self._last = {name: entry.get(name) for name in (REWARD, GAP, ENTROPY, LOSS_SCALE)}
        reward = entry.get(REWARD)
        if reward is not None and math.isfinite(reward):
            self._rewards.append(reward)
        skipped = entry.get(SKIPPED)
        if skipped is not None and math.isfinite(skipped):
            self._skipped = (self._skipped or 0.0) + skipped

    def _left_text(self) -> str:
        left = self.left_s
        return "-" if left is None else clock(left) if left == 0 else f"about {clock(left)}"

    def _validation_text(self) -> str:
        if not self._accuracy:
            return "-"
        shown = [number(value, ".1%") for value in (self._accuracy[0], self._accuracy[-1])]
        return shown[0] if len(self._accuracy) == 1 else " to ".join(shown)

    def _cells(self) -> list[tuple[str, str]]:
        return [
            ("reward", number(self._last.get(REWARD))),
            ("gap", number(self._last.get(GAP), ".2e")),
            ("entropy", number(self._last.get(ENTROPY))),
            ("loss scale", number(self._last.get(LOSS_SCALE), ",.10g")),
            ("skipped", number(self._skipped, ".0f")),
            ("validation", self._validation_text()),
        ]

    def _line(self) -> str:
        cells = ", ".join(f"{name} {value}" for name, value in self._cells())
        return f"step {self.step}/{self._total}: {cells}, elapsed {clock(self.elapsed_s)}, left {self._left_text()}"

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _redraw(self) -> None:
        if self._live is not None:
            self._live.update(self._panel(), refresh=True)

    def _panel(self) -> RenderableType:
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(ratio=1)
        head.add_column(justify="right")
        head.add_row(
            Text(self._stage, style="bold cyan"),
            Text.assemble(
                (f"step {self.step} of {self._total}", "bold"),
                (f"   elapsed {clock(self.elapsed_s)}   left {self._left_text()}", "dim"),
            ),
        )
        bar = ProgressBar(total=max(1, self._total), completed=self.step, complete_style="cyan")
        cells = Table.grid(expand=True, padding=(0, 1))
        for _ in self._cells():
            cells.add_column(justify="left", ratio=1)
        cells.add_row(*(Text(name, style="dim") for name, _ in self._cells()))
        cells.add_row(*(Text(value, style=self._style(name, value)) for name, value in self._cells()))
        parts: list[RenderableType] = [head, bar, Text(), cells]
        trend = self._trend()
        if trend:
            parts += [Text(), Text.assemble(("reward per step  ", "dim"), (trend, "cyan"))]
        return Panel(
            Group(*parts), title=Text(self._title, style="bold"), title_align="left", box=box.ROUNDED, padding=(0, 1)
        )

    @staticmethod
    def _style(name: str, value: str) -> str:
        if "nan" in value or "inf" in value:
            return "bold red"
        return "bold yellow" if name == "skipped" and value not in ("-", "0") else "bold"

    def _trend(self) -> str:
        """The reward of the last steps as a row of bars, where the terminal can show them."""
        if len(self._rewards) < 2 or not self.console.encoding.lower().startswith("utf"):
            return ""
        shown = self._rewards[-max(8, self.console.width - 24) :]
        low, span = min(shown), max(shown) - min(shown)
        return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] if span else _BARS[0] for value in shown)
