"""Intervals of means of values from 0 to 1, by simulation and by known cases."""

import math

import numpy as np
import pytest

from common.proportions import wilson_interval
from learner.evaluation.pass_at_k import pass_at_k
from learner.evaluation.shares import share


def true_pass_at_k(a, b, k):
    """The mean of 1 - (1 - x)^k for pass rates x ~ Beta(a, b): 1 - B(a, b + k) / B(a, b)."""
    return 1 - math.exp(math.lgamma(b + k) - math.lgamma(b) + math.lgamma(a + b) - math.lgamma(a + b + k))


@pytest.mark.parametrize("prompts", [16, 64, 256])
@pytest.mark.parametrize(("a", "b"), [(3, 1), (1, 1), (0.3, 0.3), (1, 10), (30, 1), (1, 30)])
def test_intervals_of_pass_at_k_contain_the_truth(a, b, prompts):
    """1,000 evaluations with 16 samples. The estimates of pass@16 are 0 and 1. Wilson's interval of few such values is
    sometimes below 95 % too."""
    draws, samples, simulated = np.random.default_rng(0), 16, 1000
    passed = draws.binomial(samples, draws.beta(a, b, (simulated, prompts)))
    for k in (1, 4, 8, 12, 16):
        estimates = pass_at_k(np.arange(samples + 1), samples)[:, k - 1][passed]
        true, found = true_pass_at_k(a, b, k), [share(row) for row in estimates]
        inside = np.mean([low <= true <= high for low, high in (figure["interval"] for figure in found)])
        assert inside >= (0.86 if k == samples else 0.93)
        assert all(low <= f["value"] <= high for f in found for low, high in [f["interval"]])
        # With many prompts and a pass@k in the middle, they are not much wider than those of the normal distribution.
        if prompts == 256 and 0.2 < true < 0.8:
            wide = np.mean([np.diff(figure["interval"])[0] for figure in found])
            assert wide < 1.15 * 2 * 1.96 * estimates.std(axis=1).mean() / 16


@pytest.mark.parametrize("passed", [0, 1, 7, 20])
def test_values_of_0_and_1_have_wilsons_interval(passed):
    found = share(np.arange(20) < passed)
    assert found["value"] == passed / 20
    assert found["interval"] == pytest.approx(wilson_interval(passed, 20), abs=1e-12)
    assert share(np.arange(1) < passed)["interval"] == pytest.approx(wilson_interval(min(1, passed), 1), abs=1e-12)


def test_many_answers_to_a_prompt_count_as_one_value():
    """All pass or none does, so 16 answers to a prompt say no more than one."""
    prompts = np.arange(20) < 7
    assert share(16.0 * prompts, np.full(20, 16)) == share(prompts)


def test_a_mean_over_answers_weighs_prompts_by_their_answers():
    found = share(np.array([2.0, 0, 1, 0]), np.array([4, 0, 2, 1]))
    assert found["value"] == pytest.approx(3 / 7)
    # Residuals 2 - 12/7, 1 - 6/7, -3/7 over the mean count 7/3: 6/49, 3/49, -9/49. Their sum of squares is 126/2401.
    reach = 4.3 * math.sqrt(126 / 2401 / 2 / 3)  # Student's t with two degrees of freedom
    low, high = found["interval"]
    assert low <= 3 / 7 - 0.98 * reach
    assert high >= 3 / 7 + 0.98 * reach
    assert share(np.zeros(2), np.zeros(2)) == {"value": None, "interval": None}


def test_one_prompt_has_the_interval_of_the_largest_variance():
    """Both ends p have (0.5 - p)^2 = 1.96^2 p (1 - p), as for one trial of a proportion."""
    for end in share(np.array([0.5]))["interval"]:
        assert (0.5 - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end))
