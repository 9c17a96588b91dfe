"""Means of values from 0 to 1, such as pass@k, with 95 % intervals. Runs in the driver.

A bootstrap cannot know about prompts that are rarer than 1 in P. If pass@k is 1 for all prompts but one, its interval
is far too short. Wilson's interval (common/proportions.py) is good for values that are either 0 or 1, at any mean p.
Values between 0 and 1 vary no more than those. So this module computes Wilson's interval instead, from the mean and the
variance over prompts.
"""

from __future__ import annotations

import math

import numpy as np

from common.student import student_quantile
from learner.evaluation.bootstrap import Figure

_Z = 1.96


def share(sums: np.ndarray, counts: np.ndarray | None = None) -> Figure:
    """The mean over answers. sums [P]: the sum of each prompt's values, which are from 0 to 1; counts [P]: their number
    (left out: 1). Prompts without values do not count.

    If the values of every prompt are all 0 or all 1, the interval is Wilson's. Otherwise it contains two intervals:
    Student's t, and Wilson's with the variance of the prompts instead of p (1 - p)."""
    counts = np.ones(len(sums)) if counts is None else np.asarray(counts, np.float64)
    sums, counts = np.asarray(sums, np.float64)[counts > 0], counts[counts > 0]
    if not (prompts := len(sums)):
        return {"value": None, "interval": None}
    p = float(sums.sum() / counts.sum())
    p = min(1.0, max(0.0, p))  # rounding
    # The variance of a ratio of means, from its residuals (the delta method); the plain variance if counts are equal.
    residuals = (sums - p * counts) / counts.mean()
    variance, largest = float((residuals**2).sum()) / max(1, prompts - 1), p * (1 - p)
    is_binary = bool(((sums == 0) | (sums == counts)).all())
    ends = _wilson(p, largest if is_binary or prompts == 1 else min(variance, largest), prompts)
    if not is_binary and prompts > 1:
        reach = student_quantile(0.975, prompts - 1) * math.sqrt(variance / prompts)
        ends = [min(ends[0], p - reach), max(ends[1], p + reach)]
    return {"value": p, "interval": [max(0.0, min(ends[0], p)), min(1.0, max(ends[1], p))]}


def _wilson(p: float, variance: float, trials: int) -> list[float]:
    """Wilson's interval of a mean with this variance of one trial. It is that of a proportion if variance is
    p (1 - p)."""
    centre = p + _Z * _Z / (2 * trials)
    spread = _Z * math.sqrt(variance / trials + _Z * _Z / (4 * trials * trials))
    scale = 1 + _Z * _Z / trials
    return [(centre - spread) / scale, (centre + spread) / scale]
