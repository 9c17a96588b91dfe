"""Resampled prompts: the bootstrap (Efron 1979). Runs in the driver, and in the ranks of the variance account.

The prompts are drawn again with replacement, each with all its samples, because the samples of one prompt are alike.
All figures of all policies share the same resamples, so two policies are compared on the same prompts.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from common.student import student_quantile

RESAMPLES = 2000  # the ends of a 95 % interval are then known to about 1 % of the resamples
_BLOCK = 100  # resamples computed at once: bounds the memory of many prompts

Figure = dict[str, Any]  # {"value": number or None, "interval": [low, high] or None}


class Bootstrap:
    """Resamples of P prompts, which depend on the seed alone."""

    def __init__(self, prompts: int, *, seed: int, resamples: int = RESAMPLES) -> None:
        self.prompts, self.resamples = prompts, resamples
        draws = np.random.default_rng(seed)
        blocks = [min(_BLOCK, resamples - first) for first in range(0, resamples, _BLOCK)]
        chances = np.full(prompts, 1 / prompts)
        # How often each prompt is in each resample, [block, P].
        self._counts = [draws.multinomial(prompts, chances, size).astype(np.uint16) for size in blocks]

    def means(self, values: np.ndarray) -> np.ndarray:
        """The mean over the prompts of each resample: [P, ...] becomes [resamples, ...]."""
        sums = [np.tensordot(counts.astype(np.float64), values, axes=1) for counts in self._counts]
        return np.concatenate(sums) / self.prompts


def interval(drawn: np.ndarray, prompts: int | None = None) -> list[float]:
    """The middle 95 % of a statistic of all resamples.

    `prompts`: the number of prompts that the statistic is computed from. With few prompts the middle 95 % would be too
    short, as if their deviation were known. So a larger middle part is taken, with which the interval of a mean is
    Student's t interval (Hesterberg 2015, arXiv:1411.5279)."""
    tail = 0.025
    if prompts is not None:
        tail = NormalDist().cdf(-math.sqrt(prompts / (prompts - 1)) * student_quantile(0.975, prompts - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return [float(low), float(high)]
