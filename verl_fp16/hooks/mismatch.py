"""Hooks where verl compares the rollout's log-probabilities with those of training, for a whole batch."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verl_fp16 import plugin
from verl_fp16.mismatch.measured import MeasuredGap
from verl_fp16.mismatch.statistics import GapStatistics

PREFIX = "mismatch/"


@dataclass
class Seen:
    """What verl has shown this process since its last training step was logged.

    Attributes:
        gap: of the newest batch; None where verl does not compare rollout and training.
        statistics: of all batches that were compared: several where a step has several updates of the trainer.
        responses: token ids and the response mask, both of shape (sequences, positions).
        ids: the names of the batch in work.
        seconds: what measuring has taken.
    """

    gap: MeasuredGap | None = None
    statistics: GapStatistics | None = None
    responses: tuple[torch.Tensor, torch.Tensor] | None = None
    ids: Sequence[str] | None = None
    seconds: float = 0.0

    def add(self, gap: MeasuredGap, seconds: float) -> None:
        self.statistics = gap.statistics if self.statistics is None else self.statistics.merge(gap.statistics)
        self.gap = gap
        self.seconds += seconds


_seen = Seen()

# Whether somebody takes what is seen: nothing is held for nobody.
watched = False


def take_seen() -> Seen:
    """What was seen since the last call."""
    global _seen
    seen, _seen = _seen, Seen()
    return seen


def add_log_prob_gap(original: Callable[[Any], dict]) -> Callable[[Any], dict]:
    def calculate_debug_metrics(data: Any) -> dict:
        metrics = original(data)
        if plugin.flag_given:
            began = time.perf_counter()
            batch = data.batch
            tokens = batch["responses"]
            mask = _response_mask(batch)[:, -tokens.size(1) :]
            ids = _seen.ids if _seen.ids is not None else getattr(data, "non_tensor_batch", {}).get("uid")
            ids = ids if ids is not None and len(ids) == len(tokens) else None
            gap = MeasuredGap.of(batch["rollout_log_probs"], batch["old_log_probs"], mask, tokens, ids)
            metrics.update(named(gap.statistics))
            if watched:
                _seen.add(gap, time.perf_counter() - began)
        return metrics

    return calculate_debug_metrics


def named(statistics: GapStatistics) -> dict[str, float]:
    """The statistics as they are logged."""
    return {PREFIX + name: value for name, value in statistics.scalars().items()}


def _response_mask(batch: Any) -> torch.Tensor:
    """As verl's function takes it."""
    for name in ("response_mask", "attention_mask"):
        if name in batch:
            return batch[name]
    return torch.ones_like(batch["rollout_log_probs"])


def remember_sample_ids(original: Callable[[Any, Any, dict], Any]) -> Callable[[Any, Any, dict], Any]:
    def _compute_old_log_prob(self: Any, batch: Any, metrics: dict) -> Any:
        _seen.ids = getattr(batch, "keys", None)
        try:
            return original(self, batch, metrics)
        finally:
            _seen.ids = None

    return _compute_old_log_prob


def remember_responses(original: Callable[..., dict]) -> Callable[..., dict]:
    def compute_data_metrics(batch: Any, *args: Any, **kwargs: Any) -> dict:
        metrics = original(batch, *args, **kwargs)
        if plugin.flag_given and watched:
            # With the mask: what a tool or an image puts into a response may repeat itself.
            _seen.responses = batch.batch["responses"], batch.batch["response_mask"]
        return metrics

    return compute_data_metrics


def leave_out_of_correction(original: Callable[..., tuple]) -> Callable[..., tuple]:
    signature = inspect.signature(original)

    def compute_rollout_correction_and_rejection_mask(*args: Any, **kwargs: Any) -> tuple:
        if not plugin.flag_given:
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        rollout, mask = given["rollout_log_prob"], given["response_mask"]
        if torch.isfinite(rollout).all():
            return original(*args, **kwargs)
        finite = torch.isfinite(rollout)
        left = mask * finite
        # verl refuses an empty mask. A ratio of 1 leaves the sum over a sequence alone.
        given["response_mask"] = left if left.any() else mask
        # Of both sides, where the other one may not be finite either.
        given["rollout_log_prob"] = torch.where(finite, rollout, 0.0)
        given["old_log_prob"] = torch.where(finite, given["old_log_prob"], 0.0)
        weights, kept, metrics = original(**given)
        if weights is not None:
            weights.batch["rollout_is_weights"] = weights.batch["rollout_is_weights"] * finite
        corrects = weights is not None or given.get("rollout_rs") is not None
        return weights, kept * finite if corrects else mask.clone(), metrics

    return compute_rollout_correction_and_rejection_mask
