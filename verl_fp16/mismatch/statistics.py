"""Statistics of the gap between rollout policy mu and training policy pi, on the tokens that mu sampled.

``d = log mu(token) - log pi(token)`` in nats. Estimators of KL(mu || pi) from samples of mu (Schulman, "Approximating
KL Divergence", 2020): ``k1 = d``, ``k2 = d^2 / 2``, ``k3 = exp(-d) - 1 + d``; each is meant over tokens.
"""

from __future__ import annotations

import torch


def log_prob_differences(rollout: torch.Tensor, training: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``d`` of the tokens in ``mask`` whose two log-probabilities are finite.

    Args:
        rollout: log mu, any shape, floating point.
        training: log pi, same shape.
        mask: true or nonzero where a token counts, same shape.

    Returns:
        float64 of shape (tokens that count,). Tokens with a non-finite log-probability are left out.
    """
    keep = mask.bool() & torch.isfinite(rollout) & torch.isfinite(training)
    return rollout[keep].double() - training[keep].double()


def k3(differences: torch.Tensor) -> torch.Tensor:
    """``exp(-d) - 1 + d`` for each token, without the cancellation of the textbook form at small ``d``."""
    return torch.expm1(-differences) + differences


def gap_metrics(rollout: torch.Tensor, training: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """The gap of one batch, as logged.

    Returns:
        ``mismatch/log_prob_abs_diff_mean`` (nats), ``mismatch/k3`` (nats) and ``mismatch/left_out_tokens``: how many
        tokens of ``mask`` had a non-finite log-probability. The first two are missing where no token counts.
    """
    differences = log_prob_differences(rollout, training, mask)
    metrics = {"mismatch/left_out_tokens": float(mask.bool().sum().item() - differences.numel())}
    if differences.numel():
        metrics["mismatch/log_prob_abs_diff_mean"] = differences.abs().mean().item()
        metrics["mismatch/k3"] = k3(differences).mean().item()
    return metrics
