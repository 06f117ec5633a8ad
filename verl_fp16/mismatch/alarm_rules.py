"""Rules on what a training step logs of the gap between training and rollout. Plain Python.

Each rule is one of :data:`RULES`, with what it looks at, when it holds, and where its default comes from. The published
numbers are those of Qi et al., arXiv 2510.26788, if nothing else is said; "(fig)" was read off a figure.
:mod:`verl_fp16.mismatch.alarms` has what is told of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from numbers import Real
from statistics import median

from verl_fp16.mismatch_settings import MismatchSettings

PREFIXES = ("mismatch/", "mismatch_first_update/")
"""Under which the statistics are logged: of the whole batch, or in bypass mode of the first mini-batch's update."""

NEWEST = 3
"""Steps whose least k3 is that of now: two outliers in a row are never it, and a lasting fault is after three steps."""

FEWEST = 4
"""Steps that make a level of k3 from which it can grow."""

K3_FLOOR = 1e-6
"""Nats: growth is counted from here where k3 was smaller. Published FP16 runs lie flat at 1e-6 to 1e-5 (fig); with a
growth of 10, no run below 1e-5 is alarmed, whatever its k3 was while it had few tokens or little entropy."""

JUMP_ERRORS = 5.0
"""Standard errors that log k3 has to jump by: of 60 simulated runs of 1,000 steps, none had an alarm where k3 varied
log-normally by 0.15, 0.3, 0.5, 0.7 or 1; one had, where at 0.3 every 33rd step was an outlier of 20 times."""

USUAL_SPREAD = 0.25
"""What log k3 varies by from step to step: 0.15 to 0.3 on a CPU, in steps of 250 to 400 tokens."""

SLOPE_ERRORS = 5.0
"""Standard errors that a slope has to differ from 0 by. That many, because the error is that of least squares with
residuals of one size: those of a sum over tokens grow with the length, and the error is then too small."""

SLOPE_SEQUENCES = 16
"""Fewer sequences have a standard error that itself is a matter of luck."""

SLOPE_LENGTH = 100.0
"""Tokens: with shorter responses on average, the slope is not judged. A token's own rounding error, the same each time
(1e-2 nats in BF16), is a difference between responses of 2 and 4 tokens that can be significant and, scaled to 1,000
tokens, lies beyond any limit; k3 tells of such runs."""


@dataclass(frozen=True)
class Alarm:
    """One fault of a training step.

    Args:
        rule: as in ``verl_fp16.mismatch.alarm_<rule>``, the setting that moves it or, with null, turns it off.
        metric: the full name of the metric, as logged.
        value: its value in this step.
        trend: how it came there.
        advice: what to do.
    """

    rule: str
    metric: str
    value: float
    trend: str
    advice: str

    def line(self, step: int) -> str:
        """All of it, in one line."""
        return (
            f"step {step}: {self.metric} is {self.value:.3g} ({self.trend}; the rule is "
            f"verl_fp16.mismatch.alarm_{self.rule}). What to do: {self.advice}"
        )


_GAP = (
    "see in which tokens with `verl-fp16 tokens FILE`; compare the dtypes in the read-back table, early in the log; "
    "measure with actor_rollout_ref.rollout.temperature=1 actor_rollout_ref.rollout.top_p=1 "
    "actor_rollout_ref.rollout.top_k=-1; algorithm.rollout_correction.rollout_is=token (TIS) bounds what the gap does "
    "to the loss"
)
ADVICE = {
    "prob_diff": f"a collapse looks like this before the reward falls: keep a checkpoint from before; {_GAP}",
    "k3_growth": f"find what changed over these steps (weights, dtypes, sampling, another kernel); {_GAP}",
    "k3_jump": f"find what changed in the last steps (weights, dtypes, sampling, another kernel); {_GAP}",
    "slope": f"long responses lose most: lower data.max_response_length helps at once; {_GAP}",
    "nonfinite_rollout": (
        "the rollout's logits are not finite, as where activations pass 65,504 in float16: `verl-fp16 preflight "
        "MODEL`, and +precision=bf16 if it says UNFIT"
    ),
    "nonfinite_training": (
        "the trainer's logits are not finite; if only this side's, look at actor/skipped_forward_steps in the log, and "
        "for the module with verl_fp16.loss_scale.trace_modules=true; +precision=bf16 if the model does not fit float16"
    ),
    "run_share": (
        "read those responses (trainer.rollout_data_dir=FOLDER writes them). The same token for ever is what a sampler "
        "makes of logits that are NaN: `verl-fp16 preflight MODEL`, and +precision=bf16 if it says UNFIT. Where all "
        "log-probabilities are finite, the policy itself repeats: a lower learning rate, or a reward that forbids it"
    ),
}


class Logged:
    """What a step logged of the gap: finite numbers only, under whichever of :data:`PREFIXES`."""

    def __init__(self, metrics: Mapping[str, float]) -> None:
        self._metrics = metrics

    def find(self, *names: str) -> tuple[str, list[float]] | None:
        """The prefix under which all of ``names`` are, and their values; None where there is none."""
        for prefix in PREFIXES:
            values = [self._number(prefix + name) for name in names]
            if None not in values:
                return prefix, values
        return None

    def near(self, prefix: str, name: str) -> float | None:
        """One value under ``prefix``, where it is logged."""
        return self._number(prefix + name)

    def _number(self, name: str) -> float | None:
        value = self._metrics.get(name)
        return float(value) if isinstance(value, Real) and math.isfinite(value) else None


class ProbDiff:
    """The signed gap pi - mu of the worst token saturates at -1 or 1 before a collapse.

    Holds where the larger of the two is at least ``alarm_prob_diff`` in this step and in 3 of the last 5: among
    millions of tokens a single one may be far off once. Published is that they saturate; the default of 0.9 is ours:
    reached before 1, and far from the 2e-3 of FP16 runs on a CPU.
    """

    def __init__(self, settings: MismatchSettings) -> None:
        self._limit = settings.alarm_prob_diff
        self._last: deque[float] = deque(maxlen=5)

    def judge(self, step: int, logged: Logged) -> Iterator[tuple[str, Alarm | None]]:
        found = [(name, logged.find(name)) for name in ("prob_diff_max", "prob_diff_min")]
        extremes = [(values[0], prefix + name) for name, hit in found if hit for prefix, values in [hit]]
        if not extremes:
            return
        value, metric = max(extremes, key=lambda extreme: abs(extreme[0]))
        self._last.append(abs(value))
        often = sum(size >= self._limit for size in self._last)
        if self._last[-1] < self._limit or often < 3:
            yield "prob_diff", None
            return
        trend = f"{self._limit:g} or more in {often} of the last {len(self._last)} steps"
        yield "prob_diff", Alarm("prob_diff", metric, value, trend, ADVICE["prob_diff"])


class K3:
    """k3 has grown: from one step to the next (:class:`K3Jump`), or within the window (:class:`K3Growth`).

    Both are one fault: where a jump was told, the growth that it is too is no news.
    """

    def __init__(self, settings: MismatchSettings) -> None:
        self._parts: list[K3Jump | K3Growth] = []
        if settings.alarm_k3_jump is not None:
            self._parts.append(K3Jump(settings.alarm_k3_jump))
        if settings.alarm_k3_growth is not None:
            self._parts.append(K3Growth(settings.alarm_k3_growth, settings.alarm_window))

    def judge(self, step: int, logged: Logged) -> Iterator[tuple[str, Alarm | None]]:
        found = logged.find("k3")
        if found is not None:
            prefix, (value,) = found
            trends = [(part.rule, part.trend(step, value)) for part in self._parts]
            alarms = [
                Alarm(rule, f"{prefix}k3", value, trend, ADVICE[rule]) for rule, trend in trends if trend is not None
            ]
            yield "k3", alarms[0] if alarms else None


class K3Growth:
    """k3 has grown within the window.

    Holds where each of the newest 3 steps is more than ``alarm_k3_growth`` times the median of the window's oldest
    fifth (4 steps at least), or :data:`K3_FLOOR` where that is larger: k3 varies, by a log-normal sigma of 0.3 in steps
    of 400 tokens on a CPU.

    The default of 10 is half of the way, in logarithms, between published FP16 and BF16 (1e-5 and 1e-3, fig); of a pair
    in which only one side is FP16, |d| is about 6 times that of FP16 (a public measurement), and k3 about 40 times.
    A level is no alarm: a BF16 run whose gap is steady has none. After a window at its new level, so has any run.
    """

    rule = "k3_growth"

    def __init__(self, limit: float, window: int) -> None:
        self._limit = limit
        self._oldest = max(FEWEST, window // 5)
        self._window: deque[tuple[int, float]] = deque(maxlen=window)

    def trend(self, step: int, value: float) -> str | None:
        """Take in k3 of a step; how it has grown, or None where that is no alarm."""
        self._window.append((step, value))
        before = len(self._window) - NEWEST
        if before < FEWEST:
            return None
        oldest = median(k3 for _, k3 in islice(self._window, min(self._oldest, before)))
        newest = min(k3 for _, k3 in islice(self._window, before, None))
        if newest <= self._limit * max(oldest, K3_FLOOR):
            return None
        return f"{oldest:.2g} -> {newest:.2g} over {step - self._window[0][0]} steps"


class K3Jump:
    """k3 has jumped, beyond what it varies by, as where one side computes something else from a step on.

    Holds where each of the newest 3 steps is more than ``alarm_k3_jump`` times the median of the 20 steps before them
    (4 at least), or :data:`K3_FLOOR` where that is larger; and, in logarithms, :data:`JUMP_ERRORS` standard errors
    above it. The error is that of two medians, from how k3 varied from step to step in those 20, and from
    :data:`USUAL_SPREAD` with the weight of 5 steps, since a few steps may be alike by chance.

    The default of 2.5 is ours: on a CPU, one of two layers rounded to BF16 in the rollout was a factor of 4, where k3
    varied by 0.15. Where it varies by 0.5, a jump has to be one of 6.
    """

    rule = "k3_jump"

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._window: deque[float] = deque(maxlen=20 + NEWEST)

    def trend(self, step: int, value: float) -> str | None:
        """As of :meth:`K3Growth.trend`."""
        self._window.append(value)
        before = list(islice(self._window, max(0, len(self._window) - NEWEST)))
        if len(before) < FEWEST:
            return None
        usual, newest = median(before), min(islice(self._window, len(before), None))
        jump = math.log(max(newest, K3_FLOOR) / max(usual, K3_FLOOR))
        if jump <= max(math.log(self._limit), JUMP_ERRORS * _error_of_medians(before)):
            return None
        return f"{usual:.2g} -> {newest:.2g}, the median of {len(before)} steps and the least of the newest {NEWEST}"


def _error_of_medians(before: list[float]) -> float:
    """Standard error of log(median of the newest / median of ``before``), for values that vary as ``before`` do.

    For the least of the newest it is on the safe side.
    """
    # Lower than the floor, or those that vary around it would seem to vary less.
    logs = [math.log(max(k3, 1e-3 * K3_FLOOR)) for k3 in before]
    changes = sorted(abs(b - a) for a, b in pairwise(logs))  # not around a mean, which a slow drift would widen
    count = len(changes)
    # Of normal values, half of the changes tell what nine tenths of them tell; outliers are among the latter only.
    spread = max(1.4826 * median(changes), changes[math.ceil(0.9 * count) - 1] / 1.645) / math.sqrt(2)
    spread = math.sqrt((count * spread**2 + 5 * USUAL_SPREAD**2) / (count + 5))
    # The median of n normal values has a variance of pi / 2n of theirs.
    return spread * math.sqrt(math.pi / 2 * (1 / len(before) + 1 / NEWEST))


class Slope:
    """The log-ratio of a sequence falls, or rises, with its length.

    Holds where in 3 steps in a row the slope is beyond ``alarm_slope``, of one sign, and :data:`SLOPE_ERRORS` standard
    errors from 0. Steps of fewer than :data:`SLOPE_SEQUENCES` sequences or of responses shorter than
    :data:`SLOPE_LENGTH` are passed over. Published: BF16 has -1.01 nats per 1,000 tokens, FP16 -0.07; the default of
    0.5 is half of the one and seven times the other.
    """

    def __init__(self, settings: MismatchSettings) -> None:
        self._limit = settings.alarm_slope
        self._last: deque[float] = deque(maxlen=3)

    def judge(self, step: int, logged: Logged) -> Iterator[tuple[str, Alarm | None]]:
        found = logged.find("slope_per_1k_tokens", "slope_per_1k_tokens_se")
        if found is None:
            return
        prefix, (slope, error) = found
        sequences, tokens = logged.near(prefix, "sequences"), logged.near(prefix, "tokens")
        few = sequences is not None and sequences < SLOPE_SEQUENCES
        if few or (sequences and tokens is not None and tokens < SLOPE_LENGTH * sequences):
            return
        beyond = abs(slope) > max(self._limit, SLOPE_ERRORS * error)
        self._last.append(math.copysign(1.0, slope) if beyond else 0.0)
        if abs(sum(self._last)) < 3:
            yield "slope", None
            return
        trend = f"standard error {error:.2g}; beyond {self._limit:g} nats per 1,000 tokens in 3 steps in a row"
        yield "slope", Alarm("slope", f"{prefix}slope_per_1k_tokens", slope, trend, ADVICE["slope"])


class NonFinite:
    """Log-probabilities that are not finite.

    Holds in every step with ``alarm_nonfinite`` tokens of one side. The default is 1: a token that was sampled has a
    finite log-probability, however unlikely it was.
    """

    def __init__(self, settings: MismatchSettings) -> None:
        self._limit = settings.alarm_nonfinite

    def judge(self, step: int, logged: Logged) -> Iterator[tuple[str, Alarm | None]]:
        for name in ("nonfinite_rollout", "nonfinite_training"):
            found = logged.find(name)
            if found is None:
                continue
            prefix, (number,) = found
            if number < self._limit:
                yield name, None
                continue
            others = logged.near(prefix, "tokens")
            beside = f", beside {others:,.0f} that are finite on both sides" if others is not None else ""
            trend = f"{number:,.0f} token{'s'[: number > 1]}{beside}"
            yield name, Alarm("nonfinite", prefix + name, number, trend, ADVICE[name])


class RunShare:
    """Responses stuck on one token, as "!!!!".

    Holds where ``repeating_rows_share`` is at least ``alarm_run_share`` in this step and in 2 of the last 3, so that
    one response of a small batch is none. It is of the step's whole batch, also where the gap is of a part of it. The
    defaults are ours: 64 of one token are no text, and of a base model's responses some repeat themselves, mostly more
    than one token.
    """

    def __init__(self, settings: MismatchSettings) -> None:
        self._limit = settings.alarm_run_share
        self._length = settings.alarm_run_tokens
        self._last: deque[bool] = deque(maxlen=3)

    def judge(self, step: int, logged: Logged) -> Iterator[tuple[str, Alarm | None]]:
        metric = f"{PREFIXES[0]}repeating_rows_share"
        share = logged.near(PREFIXES[0], "repeating_rows_share")
        if share is None:
            return
        self._last.append(share >= self._limit)
        if not self._last[-1] or sum(self._last) < 2:
            yield "run_share", None
            return
        trend = (
            f"the share of responses with one token {self._length} times in a row or more; {self._limit:g} or more in "
            f"{sum(self._last)} of the last {len(self._last)} steps"
        )
        yield "run_share", Alarm("run_share", metric, share, trend, ADVICE["run_share"])


Rule = ProbDiff | K3 | Slope | NonFinite | RunShare

RULES: tuple[tuple[Callable[[MismatchSettings], Rule], tuple[str, ...]], ...] = (
    (NonFinite, ("alarm_nonfinite",)),
    (RunShare, ("alarm_run_share", "alarm_run_tokens")),
    (ProbDiff, ("alarm_prob_diff",)),
    (K3, ()),  # of two parts, each with a setting of its own
    (Slope, ("alarm_slope",)),
)
"""Each rule, with the settings any of which turns it off with None; in the order in which alarms are told."""
