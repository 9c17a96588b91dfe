"""Intervals of figures that are means over prompts: the bootstrap (Efron 1979).

Runs in the driver, and in the ranks of the variance account.

The prompts are drawn again with replacement, each with all its samples, because the samples of one prompt are alike.
All figures of all policies share the same resamples, so the difference of two policies is that of paired prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.proportions import wilson_interval

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

    def mean(self, values: np.ndarray) -> Figure:
        """The mean over prompts, of one value for each."""
        return self.ratio(values, np.ones(len(values)))

    def ratio(self, sums: np.ndarray, counts: np.ndarray) -> Figure:
        """The mean over answers: `sums` and `counts` have the sum and the number of answers of each prompt, [P]. A
        resample without any answer says nothing and is left out."""
        if not counts.sum():
            return {"value": None, "interval": None}
        sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
        above, below = self.means(sums), self.means(counts)
        known = below > 0
        return {"value": float(sums.sum() / counts.sum()), "interval": interval(above[known] / below[known])}

    def share(self, values: np.ndarray) -> Figure:
        """The mean of values from 0 to 1. If every prompt has the value 0, or every one 1, all resamples agree and say
        nothing about other prompts: then the interval is Wilson's for this many prompts."""
        figure = self.mean(values)
        for end in (0, 1):
            if (values == end).all():
                figure = {"value": float(end), "interval": list(wilson_interval(end * len(values), len(values)))}
        return figure


def interval(drawn: np.ndarray) -> list[float]:
    """The middle 95 % of a statistic of all resamples."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return [float(low), float(high)]
