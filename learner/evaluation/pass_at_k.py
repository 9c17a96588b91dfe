"""pass@k: the chance that at least one of k answers to a prompt passes. Runs in the driver."""

from __future__ import annotations

import numpy as np

from learner.evaluation.bootstrap import Figure
from learner.evaluation.shares import share


def pass_at_k(passed: np.ndarray, samples: int) -> np.ndarray:
    """The estimate for each prompt and each k = 1 .. samples, [P, samples]. `passed`: how many of its `samples` answers
    passed, [P].

    Unbiased (Chen et al. 2021, arXiv:2107.03374, equation 1): 1 - C(n - c, k) / C(n, k), the share of all sets of k of
    the n answers that contain one of the c that passed. 1 - (1 - c/n)^k would be too low for k above 1.
    """
    k = np.arange(1, samples + 1)
    failed = samples - np.arange(samples + 1)[:, None]  # n - c for every possible c
    # C(n - c, k) / C(n, k) is the product over j = 1 .. k of (n - c - j + 1) / (n - j + 1).
    none_passed = np.cumprod(np.maximum(0, failed - k + 1) / (samples - k + 1), axis=1)
    return (1 - none_passed)[passed]


def pass_figures(estimates: np.ndarray) -> list[Figure]:
    """The mean over prompts with its interval, for each k: the first figure is pass@1."""
    return [share(column) for column in estimates.T]
