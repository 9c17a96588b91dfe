"""Variances over the tokens of a batch, with intervals from resampled prompts: pure functions of arrays.

Runs in every rank of the variance account. Arrays are [B, R], and the mask is True on response tokens. Tokens of one
response, and responses to one prompt, are not independent. So an interval comes from batches in which whole prompts
are drawn again (learner/evaluation/bootstrap.py). All figures share the same draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from learner.evaluation.bootstrap import Bootstrap, Figure, interval
from learner.ppo.critic_quality import positions


class Resampled:
    """The batch, and resamples of it: as many prompts, drawn with replacement."""

    def __init__(self, groups: np.ndarray, *, seed: int) -> None:
        """groups [B]: equal for responses to one prompt."""
        _, self._group = np.unique(groups, return_inverse=True)
        self._bootstrap = Bootstrap(int(self._group.max()) + 1, seed=seed)

    def variance(self, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The population variance of x over the mask, [1 + resamples]: of the batch, then of each resample. NaN where
        there is no token."""
        known = np.where(mask, x, 0.0).astype(np.float64)
        centred = np.where(mask, known - known.sum() / max(1, mask.sum()), 0.0)  # so that no digits are lost below
        rows = np.stack([mask.sum(1), centred.sum(1), (centred**2).sum(1)], axis=1)
        sums = np.zeros((self._bootstrap.prompts, 3))
        np.add.at(sums, self._group, rows)
        count, total, squares = np.concatenate([sums.mean(0)[None], self._bootstrap.means(sums)]).T
        with np.errstate(invalid="ignore"):
            return np.maximum(squares / count - (total / count) ** 2, 0.0)


def figure(values: np.ndarray) -> Figure | None:
    """The value of the batch, with an interval from the resamples; None if it is undefined."""
    if not np.isfinite(values[0]):
        return None
    return {"value": float(values[0]), "interval": interval(values[1:][np.isfinite(values[1:])])}


def variance_account(
    advantages: Mapping[str, np.ndarray], returns: np.ndarray, mask: np.ndarray, resampled: Resampled
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The figures of the returns, and those of each estimator's advantages before whitening: the mean and the variance
    over all tokens, and the variance divided by that of the returns."""
    of_returns = resampled.variance(returns, mask)
    found = {}
    for name, values in advantages.items():
        variance = resampled.variance(values, mask)
        found[name] = {
            "mean": float(values[mask].astype(np.float64).mean()),
            "variance": figure(variance),
            "of_returns": figure(_ratio(variance, of_returns)),
        }
    mean = float(returns[mask].astype(np.float64).mean())
    return {"mean": mean, "variance": figure(of_returns)}, found


def explained_account(
    values: np.ndarray, returns: np.ndarray, mask: np.ndarray, resampled: Resampled
) -> dict[str, dict[str, Any]]:
    """The explained variance of the values in each part of the response (learner/ppo/critic_quality.py), next to the
    variance of the returns there."""
    found = {}
    for name, part in {"realised": mask, **positions(mask)}.items():
        of_returns = resampled.variance(returns, part)
        unexplained = resampled.variance(returns.astype(np.float64) - values, part)
        found[name] = {
            "tokens": int(part.sum()),
            "explained_variance": figure(1 - _ratio(unexplained, of_returns)),
            "returns_variance": figure(of_returns),
        }
    return found


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """NaN where the variance below is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)
