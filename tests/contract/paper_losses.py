"""The losses of the recipes' algorithms in float64, written from their formulas (arXiv 2510.26788 and what it cites).

Shapes: an answer's tokens are a row of (answers, positions), ``mask`` says which positions are tokens, and rewards are
(answers,). With r = pi / pi_old of a token, w = pi / mu or pi_old / mu, and A the advantage. ``sg`` is a tensor without
gradient. Nothing here is verl's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """What a mini-batch's loss is made of.

    Args:
        questions: (answers,), the number of each answer's question.
        rewards: (answers,).
        mask: (answers, positions), bool.
        pi: log-probs of the policy that is trained, with gradient; pi_old: of the same engine before the step;
            mu: of the rollout; all (answers, positions).
        values: the critic's before the step; predicted: now, with gradient.
    """

    questions: Tensor
    rewards: Tensor
    mask: Tensor
    pi: Tensor
    pi_old: Tensor
    mu: Tensor
    values: Tensor
    predicted: Tensor


def advantages(answers: Answers, *, by_std: bool) -> Tensor:
    """A_i = R_i - mean(R of the question), divided by their standard deviation (n - 1) where asked; per token."""
    result = torch.zeros_like(answers.rewards)
    for question in answers.questions.unique():
        own = answers.questions == question
        rewards = answers.rewards[own]
        result[own] = rewards - rewards.mean()
        if by_std:
            result[own] /= rewards.std() + 1e-6
    return result[:, None] * answers.mask


def generalised_advantages(answers: Answers, gamma: float = 1.0, lam: float = 1.0) -> tuple[Tensor, Tensor]:
    """GAE of a reward at the last token: A_t = sum_l (gamma lam)^l delta_(t+l), and the returns A_t + V_t."""
    found = torch.zeros_like(answers.values)
    for row, mask in enumerate(answers.mask):
        length = int(mask.sum())
        value = answers.values[row, :length].tolist() + [0.0]
        reward = [0.0] * (length - 1) + [float(answers.rewards[row])]
        delta = [reward[t] + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            found[row, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
    return found, (found + answers.values) * answers.mask


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Less their mean, divided by their standard deviation (n - 1), over the tokens of the batch."""
    tokens = values[mask]
    return (values - tokens.mean()) / (tokens.var() + 1e-8).sqrt() * mask


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """By token: above / below of log-probs."""
    return (above - below).exp()


def sequence_ratio(above: Tensor, below: Tensor, mask: Tensor) -> Tensor:
    """By answer: the product over its tokens, (answers, 1)."""
    return ((above - below) * mask).sum(-1, keepdim=True).exp()


def truncated(weight: Tensor, bound: float) -> Tensor:
    return weight.clamp(max=bound)


def masked(weight: Tensor, bound: float) -> Tensor:
    return weight * (weight <= bound)


def clipped(answers: Answers, advantage: Tensor, low: float, high: float, c: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), and not beyond -c A where A < 0."""
    r = ratio(answers.pi, answers.pi_old)
    loss = -torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)
    return torch.where(advantage < 0, torch.minimum(loss, -c * advantage), loss)


def policy_gradient(answers: Answers, advantage: Tensor, weight: Tensor) -> Tensor:
    """-sg[w] A log pi."""
    return -weight.detach() * advantage * answers.pi


def over_constant(loss: Tensor, mask: Tensor, length: int) -> Tensor:
    """1/B sum_i 1/L sum_t: the same L for every answer."""
    return (loss * mask).sum() / (len(loss) * length)


def over_answers(loss: Tensor, mask: Tensor) -> Tensor:
    """1/B sum_i 1/|answer| sum_t."""
    return ((loss * mask).sum(-1) / mask.sum(-1)).mean()


def over_tokens(loss: Tensor, mask: Tensor) -> Tensor:
    """1/T sum_it."""
    return loss[mask].mean()


def grpo(answers: Answers, length: int, weight: Tensor | float = 1.0) -> Tensor:
    """Dr.GRPO's normalisation, clip 0.2 / 0.28; the importance weight of pi_old against mu multiplies the loss."""
    loss = clipped(answers, advantages(answers, by_std=False), 0.2, 0.28, c=3.0)
    return over_constant(weight * loss, answers.mask, length)


def grpo_token_tis(answers: Answers, length: int, bound: float = 3.0) -> Tensor:
    return grpo(answers, length, truncated(ratio(answers.pi_old, answers.mu), bound))


def grpo_seq_mis(answers: Answers, length: int, bound: float = 3.0) -> Tensor:
    return grpo(answers, length, masked(sequence_ratio(answers.pi_old, answers.mu, answers.mask), bound))


def gspo(answers: Answers, length: int, *, by_std: bool = False) -> Tensor:
    """mean_i -min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A), s = (prod_t pi / pi_old)^(1 / |answer|)."""
    s = (((answers.pi - answers.pi_old) * answers.mask).sum(-1) / answers.mask.sum(-1)).exp()
    advantage = advantages(answers, by_std=by_std)[:, 0]
    return -torch.minimum(s * advantage, s.clamp(1 - 3e-4, 1 + 4e-4) * advantage).mean()


def pg(answers: Answers, length: int, weight: Tensor) -> Tensor:
    loss = policy_gradient(answers, advantages(answers, by_std=False), weight)
    return over_constant(loss, answers.mask, length)


def pg_seq_is(answers: Answers, length: int) -> Tensor:
    return pg(answers, length, sequence_ratio(answers.pi, answers.mu, answers.mask))


def pg_seq_tis(answers: Answers, length: int, bound: float = 3.0) -> Tensor:
    return pg(answers, length, truncated(sequence_ratio(answers.pi, answers.mu, answers.mask), bound))


def pg_seq_mis(answers: Answers, length: int, bound: float = 3.0) -> Tensor:
    return pg(answers, length, masked(sequence_ratio(answers.pi, answers.mu, answers.mask), bound))


def pg_token_is(answers: Answers, length: int) -> Tensor:
    return pg(answers, length, ratio(answers.pi, answers.mu))


def dapo(answers: Answers, length: int) -> Tensor:
    loss = clipped(answers, advantages(answers, by_std=True), 0.2, 0.28, c=10.0)
    return over_tokens(loss, answers.mask)


def grpo_plain(answers: Answers, length: int) -> Tensor:
    """GRPO of arXiv 2402.03300 with the mean over tokens, as verl has it by default."""
    return over_tokens(clipped(answers, advantages(answers, by_std=True), 0.2, 0.2, c=3.0), answers.mask)


def ppo(answers: Answers, length: int) -> Tensor:
    advantage = whitened(generalised_advantages(answers)[0], answers.mask)
    return over_tokens(clipped(answers, advantage, 0.2, 0.2, c=3.0), answers.mask)


def value(answers: Answers, clip: float = 0.5) -> Tensor:
    """1/2 mean_t max((V - R)^2, (clip(V, V_old - 0.5, V_old + 0.5) - R)^2), R the returns."""
    _, returns = generalised_advantages(answers)
    near = torch.clamp(answers.predicted, answers.values - clip, answers.values + clip)
    loss = torch.maximum((answers.predicted - returns) ** 2, (near - returns) ** 2)
    return 0.5 * over_tokens(loss, answers.mask)


Loss = Callable[[Answers, int], Tensor]
LOSSES: dict[str, Loss] = {
    "grpo": grpo,
    "grpo_token_tis": grpo_token_tis,
    "grpo_seq_mis": grpo_seq_mis,
    "gspo": gspo,
    "pg_seq_is": pg_seq_is,
    "pg_seq_tis": pg_seq_tis,
    "pg_seq_mis": pg_seq_mis,
    "pg_token_is": pg_token_is,
    "dapo": dapo,
    "grpo_plain": grpo_plain,
    "ppo": ppo,
}


def with_gradient(loss: Loss, answers: Answers, length: int, of: Tensor) -> tuple[float, Tensor]:
    """The loss and its gradient with respect to ``of``."""
    found = loss(answers, length)
    return float(found.detach()), torch.autograd.grad(found, of)[0]
