"""The crossover: how often the base must be asked to beat a trained policy. Runs in the driver.

Two questions, both with "none" as a possible answer:

    once    the smallest k from which on the base, asked k times, beats the policy asked once:  base@k > policy@1
    equal   the smallest k from which on the base beats the policy if both are asked k times:   base@k > policy@k
"""

from __future__ import annotations

from typing import Any

import numpy as np

from learner.evaluation.bootstrap import Bootstrap

_EQUAL = 1e-9  # a smaller difference of two means is rounding


def first_above(base: np.ndarray, target: np.ndarray) -> np.ndarray:
    """For each row of pass@k, k = 1 .. N: the smallest k from which on `base` is above `target` up to N, or N + 1 if
    there is none. [..., N] becomes [...]."""
    not_above = base <= target + _EQUAL
    # The last k at which `base` is not above the target; 0 if there is none.
    last = np.where(not_above, np.arange(1, base.shape[-1] + 1), 0).max(axis=-1)
    return last + 1


def crossover(base: np.ndarray, trained: np.ndarray, bootstrap: Bootstrap, *, equal: bool = False) -> dict[str, Any]:
    """The crossover of the estimates of pass@k of both policies, [P, N] each. `equal`: both are asked k times.

    {"value": k, "interval": [low, high], "share": s, "up_to": N}; None in place of a k: none up to N. `share`: the
    share of the resamples with a crossover. A resample without one counts in the interval as a k beyond N. So if the
    interval has no upper end, there may be no crossover.
    """
    samples = base.shape[1]

    def of(base: np.ndarray, trained: np.ndarray) -> np.ndarray:
        return first_above(base, trained if equal else trained[..., :1])

    def number(k: float) -> int | None:
        return int(k) if k <= samples else None

    found = of(bootstrap.means(base), bootstrap.means(trained))
    low, high = np.quantile(found, [0.025, 0.975], method="inverted_cdf")  # a k that occurs, not one between two
    return {
        "value": number(float(of(base.mean(0), trained.mean(0)))),
        "interval": [number(low), number(high)],
        "share": float((found <= samples).mean()),
        "up_to": samples,
    }
