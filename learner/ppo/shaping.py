"""Score and KL penalty to per-token rewards, and the controllers of the penalty's coefficient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def k1(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Unbiased single-sample estimate of KL(sampler || other): -x, with x = log(other) - log(sampler)."""
    return logprobs - other_logprobs


def k2(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """x^2 / 2: never negative, biased by the third order in x."""
    return (logprobs - other_logprobs) ** 2 / 2


def k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """exp(x) - 1 - x: unbiased and never negative. Where the other policy finds the token likelier (x > 0) the estimate
    is capped at 10 nats, as in verl, SkyRL and OpenRLHF: uncapped it grows exponentially, and one token would then
    decide the whole batch or overflow."""
    x = other_logprobs - logprobs
    return torch.where(x > 0, (torch.expm1(x) - x).clamp(max=10), torch.expm1(x) - x)


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Rewards [B, R]: every response token pays `kl_coef * kl`, the last one gets the score [B] on top."""
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    lengths = mask.sum(1)
    written = lengths > 0
    rewards[written, lengths[written] - 1] += scores[written]
    return rewards


@dataclass
class RunningMoments:
    """Mean and variance of every number seen, in float64, batch by batch (Chan et al. 1979, eq. 2.1)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def update(self, values: Tensor) -> None:
        values = values.double()
        if (added := len(values)) == 0:
            return
        batch_mean = values.mean().item()
        distance, total = batch_mean - self.mean, self.count + added
        self.squares += ((values - batch_mean) ** 2).sum().item() + distance**2 * self.count * added / total
        self.mean += distance * added / total
        self.count = total

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def normalise(scores: Tensor, moments: RunningMoments, *, centre: bool, clip: float) -> Tensor:
    """Scores [B] in deviations of everything seen so far, about its mean if `centre`, clipped to +/- clip (0: not).

    The unit of the score, and with `centre` its origin, then cannot matter. Scores that never varied say nothing about
    better or worse: they become 0. Rounding of the mean alone is not variation.
    """
    scores = scores.double()
    if moments.deviation <= 1e-12 * abs(moments.mean):
        return torch.zeros_like(scores, dtype=torch.float32)
    scaled = (scores - moments.mean if centre else scores) / moments.deviation
    return (scaled.clamp(-clip, clip) if clip else scaled).float()


class KLController(Protocol):
    """Holds the coefficient of the KL penalty."""

    coef: float

    def update(self, kl_per_response: float, num_responses: int) -> None:
        """Told after each step what KL from the reference the batch had, nats per response."""


@dataclass
class FixedKL:
    coef: float

    def update(self, kl_per_response: float, num_responses: int) -> None:
        pass


@dataclass
class AdaptiveKL:
    """Log-space proportional controller (Ziegler et al. 2019, section 2.2).

    The error `kl / target - 1`, clipped to +/- 0.2, changes the coefficient by the factor
    `1 + error * num_responses / horizon`.
    """

    coef: float
    target: float
    horizon: int

    def update(self, kl_per_response: float, num_responses: int) -> None:
        error = min(max(kl_per_response / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_responses / self.horizon
