"""pass@k against the share of all sets of k answers that pass; intervals against resamples drawn by a loop."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from learner.evaluation.bootstrap import Bootstrap, interval
from learner.evaluation.pass_at_k import pass_at_k, pass_figures
from learner.evaluation.shares import share

N = 7


def share_of_sets_that_pass(passed: int, samples: int, k: int) -> float:
    """By definition: of all sets of k among the answers, those with at least one that passed."""
    answers = [i < passed for i in range(samples)]
    sets = list(combinations(answers, k))
    return sum(any(chosen) for chosen in sets) / len(sets)


def test_pass_at_k_is_the_share_of_sets_with_an_answer_that_passed():
    expected = [[share_of_sets_that_pass(c, N, k) for k in range(1, N + 1)] for c in range(N + 1)]
    np.testing.assert_allclose(pass_at_k(np.arange(N + 1), N), expected, atol=1e-12)


def test_pass_at_k_by_hand():
    # 1 of 3 answers passed: of the sets of 2, {p, a}, {p, b} and {a, b}, two have it.
    np.testing.assert_allclose(pass_at_k(np.array([1]), 3), [[1 / 3, 2 / 3, 1]], atol=1e-12)


def test_pass_at_k_has_the_expectation_of_the_true_chance():
    """Over all outcomes of n answers that pass with chance p, weighted by their binomial chance: 1 - (1 - p)^k."""
    p = 0.3
    chances = np.zeros(N + 1)
    chances[0] = 1
    for _ in range(N):  # one more answer passes or does not
        chances = (1 - p) * chances + p * np.concatenate([[0], chances[:-1]])
    mean = chances @ pass_at_k(np.arange(N + 1), N)
    np.testing.assert_allclose(mean, [1 - (1 - p) ** k for k in range(1, N + 1)], atol=1e-12)


def resampled_means(values: np.ndarray, seed: int, resamples: int) -> list[float]:
    """The means of the resamples, one prompt after another."""
    counts = np.random.default_rng(seed).multinomial(len(values), [1 / len(values)] * len(values), resamples)
    return [sum(n * v for n, v in zip(row, values)) / len(values) for row in counts]


def test_an_interval_is_the_middle_95_percent_of_the_resamples():
    values = np.random.default_rng(0).random(12)
    low, high = interval(Bootstrap(12, seed=5, resamples=100).means(values))
    drawn = sorted(resampled_means(values, 5, 100))
    # Of 100 numbers in order, 2.5 % is between the third and the fourth: at place 0.025 * 99 = 2.475.
    assert low == pytest.approx(drawn[2] + 0.475 * (drawn[3] - drawn[2]))
    assert high == pytest.approx(drawn[96] + 0.525 * (drawn[97] - drawn[96]))


def test_many_resamples_are_drawn_in_blocks_without_a_difference():
    values = np.arange(9.0)
    counts = np.random.default_rng(3).multinomial(9, [1 / 9] * 9, 100)
    np.testing.assert_allclose(Bootstrap(9, seed=3, resamples=250).means(values)[:100], counts @ values / 9)
    assert len(Bootstrap(9, seed=3, resamples=250).means(values)) == 250


def test_the_figures_are_means_over_prompts_for_each_k():
    estimates = pass_at_k(np.array([0, 2, 7, 7]), N)
    found = pass_figures(estimates)
    assert [figure["value"] for figure in found] == pytest.approx(estimates.mean(0))
    assert found == [share(column) for column in estimates.T]
