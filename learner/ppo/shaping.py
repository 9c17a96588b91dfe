"""From scores and a KL penalty to rewards per token, and the controllers of the penalty's coefficient.

Runs in every learner rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.config.ppo import KLConfig
from common.model.masking import check_no_holes


def k1(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Unbiased single-sample estimate of KL(sampler || other): -x, with x = log(other) - log(sampler)."""
    return logprobs - other_logprobs


def k2(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """x^2 / 2: never negative, biased by the third order in x."""
    return (logprobs - other_logprobs) ** 2 / 2


def k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """exp(x) - 1 - x: unbiased and never negative.

    Where the other policy finds the token likelier (x > 0) the estimate is capped at 10 nats, as in verl, SkyRL and
    OpenRLHF. Without the cap it grows exponentially, and one token could dominate the whole batch or overflow.
    """
    x = other_logprobs - logprobs
    return torch.where(x > 0, (torch.expm1(x) - x).clamp(max=10), torch.expm1(x) - x)


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Rewards [B, R]: every response token pays `kl_coef * kl`, and the last one also gets the score [B].

    An empty response has no token for its score. Raises ValueError for a mask with holes, because the score would then
    go to a token that does not count.
    """
    check_no_holes(mask)
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    lengths = mask.sum(1)
    written = lengths > 0
    rewards[written, lengths[written] - 1] += scores[written]
    return rewards


@dataclass
class RunningMoments:
    """Mean and variance of all numbers seen so far, updated by batches in float64 (Chan et al. 1979, eq. 2.1)."""

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
    """Scores [B] normalised by all scores seen so far: minus their mean (if `centre`), divided by their deviation, then
    clipped to +/- clip (0: not clipped).

    So the unit of the scores does not matter; with `centre`, their origin does not matter either. Scores that never
    varied become 0, since they do not tell better from worse. Rounding of the mean alone does not count as variation.
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
        """Called after each step with the batch's KL from the reference, nats per response."""


@dataclass
class FixedKL:
    """Never changes the coefficient."""

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


def kl_controller(cfg: KLConfig) -> KLController:
    """The controller that the config names."""
    return AdaptiveKL(cfg.coef, cfg.target, cfg.horizon) if cfg.controller == "adaptive" else FixedKL(cfg.coef)
