"""A small batch on which the algorithms of the recipes differ: 6 questions with 4 answers of 2 to 7 tokens.

Each number is one of float32, as verl computes, so that the formulas in float64 start from the same.
"""

from __future__ import annotations

import torch
from paper_losses import Answers

QUESTIONS, ANSWERS, WIDTH = 6, 4, 7
LENGTHS = (2, 7, 5, 3, 6, 4, 2, 7, 3, 5, 6, 4, 7, 2, 4, 5, 4, 3, 6, 3, 5, 2, 7, 4)
PROMPTS = (1, 3, 2, 3, 2, 1)  # tokens of each question's prompt
REWARDS = (1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0.5, 0, 0, 1, 0.25, -0.5, 1, 0, 0, 0.5, 1, 0, 1, 0)
# Of an answer, log pi_old - log mu and log pi - log pi_old: their sums are near nothing, beyond +-log 3, or in between.
# The last two questions' are close to a bound on either side of it, log 3 = 1.0986, or far beyond all of them.
OLD_SUMS = (0.1, 1.8, -1.9, 0.9, -0.2, 2.4, -0.8, 1.5, 0.3, -2.2, 1.2, -1.3, 0, 2, -0.5, 0.7)
OLD_SUMS += (1.05, 1.15, -8, 12, -1.05, -1.15, 1.08, 1.12)
NEW_SUMS = (0.4, 0.6, 0, 1.9, 0, -0.7, 0, 0.8, -0.3, 1, 0, 2.5, 0, -1.2, 0.5, -0.6, 0, 0, 0, 0, 0, 0, 0, 0)
# Most of an answer's 12 is one token's, which the rollout thought all but impossible: a ratio above 1e3.
PEAK, HEIGHT = (OLD_SUMS.index(12), 1), 10.0


def make_answers() -> Answers:
    """The batch in float64; ``pi`` and ``predicted`` want a gradient."""
    generator = torch.Generator().manual_seed(3)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(len(LENGTHS), WIDTH, generator=generator)

    mask = torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]
    mu = -0.2 - 2 * torch.rand(len(LENGTHS), WIDTH, generator=generator)
    by_old = noise(0.7)
    mu[PEAK] -= HEIGHT
    by_old[PEAK] += HEIGHT
    pi_old = mu + _with_sums(by_old, mask, OLD_SUMS)
    pi = pi_old + _with_sums(noise(0.5), mask, NEW_SUMS)
    # Tokens of wrong answers that became four and fourteen times as probable: beyond both bounds of the dual clip.
    pi[3, 0] = pi_old[3, 0] + 1.4
    pi[11, 2] = pi_old[11, 2] + 2.65
    values = noise(0.5)
    predicted = values + noise(0.6)
    return Answers(
        questions=torch.arange(QUESTIONS).repeat_interleave(ANSWERS),
        rewards=torch.tensor(REWARDS, dtype=torch.float64),
        mask=mask,
        pi=(pi * mask).double().requires_grad_(),
        pi_old=(pi_old * mask).double(),
        mu=(mu * mask).double(),
        values=(values * mask).double(),
        predicted=(predicted * mask).double().requires_grad_(),
    )


def _with_sums(noise: torch.Tensor, mask: torch.Tensor, sums: tuple[float, ...]) -> torch.Tensor:
    excess = (noise * mask).sum(-1) - torch.tensor(sums)
    return (noise - (excess / mask.sum(-1))[:, None]) * mask
