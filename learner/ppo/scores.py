"""The running statistics of all scores, and scores normalised by them. Runs in every learner rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.actors import RewardConfig

FARTHEST = 20.0  # deviations; a value beyond counts as if it were this far


@dataclass
class RunningMoments:
    """Mean and variance of all numbers seen so far, updated by batches in float64 (Chan et al. 1979, eq. 2.1).

    A value far away counts as if it were FARTHEST deviations from the mean. Otherwise one score of 1e38 would make all
    others look equal for the rest of the run.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def update(self, values: Tensor) -> None:
        values = values.double()
        if (added := len(values)) == 0:
            return
        centre, deviation = (self.mean, self.deviation) if self.varied else robust_moments(values)
        if deviation > 0:
            values = values.clamp(centre - FARTHEST * deviation, centre + FARTHEST * deviation)
        batch_mean = values.mean().item()
        distance, total = batch_mean - self.mean, self.count + added
        self.squares += ((values - batch_mean) ** 2).sum().item() + distance**2 * self.count * added / total
        self.mean += distance * added / total
        self.count = total

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def varied(self) -> bool:
        """False if all numbers were equal. Rounding of the mean alone does not count as variation."""
        return self.deviation > 1e-12 * abs(self.mean)


def robust_moments(values: Tensor) -> tuple[float, float]:
    """Median, and an estimate of the standard deviation that outliers hardly change: 1.4826 times the median distance
    from the median, which is the standard deviation of normal numbers. If half of the numbers or more are equal, their
    distances of 0 do not count. 0 if all numbers are equal."""
    median = values.median()
    distances = (values - median).abs()
    spread = distances.median()
    if spread == 0 and bool(distances.any()):
        spread = distances[distances > 0].median()
    return median.item(), 1.4826 * spread.item()


def normalise(scores: Tensor, moments: RunningMoments, *, centre: bool, clip: float) -> Tensor:
    """Scores [B] normalised by all scores seen so far: minus their mean (if `centre`) and divided by their deviation.
    Before that, scores more than `clip` deviations from the mean are moved to that distance (0: they stay).

    So the unit of the scores does not matter; with `centre`, their origin does not matter either. Scores that never
    varied become 0, since they do not tell better from worse.
    """
    scores = scores.double()
    if not moments.varied:
        return torch.zeros_like(scores, dtype=torch.float32)
    distances = (scores - moments.mean) / moments.deviation
    distances = distances.clamp(-clip, clip) if clip else distances
    return (distances if centre else distances + moments.mean / moments.deviation).float()


def shaped(scores: Tensor, moments: RunningMoments, cfg: RewardConfig) -> Tensor:
    """Scores [B] as `reward.normalise` says, float32."""
    if cfg.normalise == "none":
        return scores.float()
    return normalise(scores, moments, centre=cfg.normalise == "mean_std", clip=cfg.clip)


def shaped_turns(turn_rewards: Tensor, moments: RunningMoments, cfg: RewardConfig) -> Tensor | None:
    """An environment's rewards for turns, [B, R], weighted and in the unit of the shaped scores, float32. None if they
    are no part of the score."""
    weight = cfg.turn_weight
    if weight == 0:
        return None
    if cfg.normalise == "none":
        return turn_rewards * weight
    if not moments.varied:
        return torch.zeros_like(turn_rewards)
    return (turn_rewards.double() * weight / moments.deviation).float()
