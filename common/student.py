"""Quantiles of Student's t distribution, for intervals from few values. Runs anywhere."""

from __future__ import annotations

import math
from statistics import NormalDist


def student_quantile(probability: float, freedom: int) -> float:
    """A quantile of Student's t distribution: exact with 1 and 2 degrees of freedom, otherwise by an expansion around
    the normal quantile (Abramowitz and Stegun 1964, 26.7.5). At 97.5 % its error is 0.12 % with 3 degrees of freedom,
    and below 0.002 % with 7 or more."""
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        x = 2 * probability - 1
        return x * math.sqrt(2 / (1 - x * x))
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
