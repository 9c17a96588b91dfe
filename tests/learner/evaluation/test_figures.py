"""Figures with intervals, against distributions that can be written down."""

import math
import statistics

import numpy as np
import pytest

from learner.evaluation.bootstrap import Bootstrap
from learner.evaluation.figures import fell, figures, jackknife, mean, ratio, rose, sums_by_prompt


def figure(value, interval):
    return {"value": value, "interval": interval}


def test_sums_are_those_of_a_loop_over_items():
    prompts, first, second = np.array([3, 0, 3, 3, 1]), np.array([1.0, 2, 3, 4, 5]), np.array([0.5, 0, 0, 1, 2])
    by_hand = [[0.0, 0.0] for _ in range(5)]
    for prompt, x, y in zip(prompts.tolist(), first.tolist(), second.tolist()):
        by_hand[prompt][0] += x
        by_hand[prompt][1] += y
    assert sums_by_prompt(prompts, 5, first, second).tolist() == by_hand


def test_the_interval_of_three_prompts_is_that_of_the_binomial_distribution():
    """Resampled means of 0, 0 and 1 are k / 3, k binomial with p = 1/3: P(0) = 8/27, P(3) = 1/27, above 2.5 % both."""
    found = mean(np.arange(3), np.array([0.0, 0, 1]), Bootstrap(3, seed=0))
    assert found == figure(pytest.approx(1 / 3), [0, 1])
    # Of four prompts P(4) = 1/256 is below 2.5 %, P(3) = 12/256 is not.
    assert mean(np.arange(4), np.array([0.0, 0, 0, 1]), Bootstrap(4, seed=0)) == figure(0.25, [0, 0.75])


def test_the_interval_of_many_prompts_is_two_standard_errors_wide():
    values = np.random.default_rng(3).gamma(2, size=400)
    found = mean(np.arange(400), values, Bootstrap(400, seed=0))
    error = statistics.pstdev(values.tolist()) / math.sqrt(400)
    assert found["value"] == pytest.approx(statistics.fmean(values.tolist()))
    low, high = found["value"] - 1.96 * error, found["value"] + 1.96 * error
    assert found["interval"] == pytest.approx([low, high], abs=0.2 * error)


def test_alike_answers_to_one_prompt_do_not_narrow_the_interval():
    values, bootstrap = np.random.default_rng(4).normal(size=20), Bootstrap(20, seed=0)
    often = mean(np.arange(20).repeat(10), values.repeat(10), bootstrap)
    assert often["interval"] == pytest.approx(mean(np.arange(20), values, bootstrap)["interval"], rel=1e-12)


def test_resamples_without_a_figure_do_not_count():
    """The second prompt has no items, so a resample with it alone has no mean."""
    sums, bootstrap = np.array([[2.0, 1.0], [0.0, 0.0]]), Bootstrap(2, seed=0)
    assert figures(sums, bootstrap, ratio) == [figure(2.0, [2.0, 2.0])]
    assert figures(np.zeros((2, 2)), bootstrap, ratio) == [figure(None, None)]


def test_one_prompt_has_no_interval():
    assert mean(np.array([0, 0]), np.array([1.0, 2.0]), Bootstrap(1, seed=0)) == figure(1.5, None)
    assert jackknife(0.5, np.array([0.0])) == figure(0.5, None)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """Quenouille and Tukey: for a mean it equals the usual standard error, sample deviation / sqrt(n)."""
    values = [1.0, 4.0, 2.0, 8.0]
    without = np.array([statistics.fmean(values[:i] + values[i + 1 :]) for i in range(4)])
    error = statistics.stdev(values) / 2
    assert jackknife(3.75, without)["interval"] == pytest.approx([3.75 - 1.96 * error, 3.75 + 1.96 * error])


def test_a_change_rose_or_fell_only_if_its_interval_leaves_zero():
    assert rose(figure(1, [0.1, 2]))
    assert fell(figure(-1, [-2, -0.1]))
    for change in (figure(1, [-0.1, 2]), figure(1, [0, 2]), figure(-1, [-2, 0]), figure(1, None)):
        assert not rose(change)
        assert not fell(change)
