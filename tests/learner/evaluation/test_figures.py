"""Figures with intervals, against distributions that can be written down, and by simulation."""

import math
import statistics

import numpy as np
import pytest

from common.proportions import wilson_interval
from learner.evaluation.bootstrap import Bootstrap, interval
from learner.evaluation.figures import fell, figures, jackknife, mean, mean_score, ratio, rose, sums_by_prompt
from learner.evaluation.proxy import change
from learner.evaluation.shares import share


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
    """Resampled means of 0, 0 and 1 are k / 3, k binomial with p = 1/3: P(0) = 8/27, P(3) = 1/27."""
    found = mean(np.arange(3), np.array([0.0, 0, 1]), Bootstrap(3, seed=0))
    assert found == figure(pytest.approx(1 / 3), [0, 1])


def test_few_prompts_have_an_interval_of_more_than_95_percent_of_the_resamples():
    """Student's t with 3 degrees of freedom is 3.18. Times sqrt(4 / 3) it is 3.67 normal deviations: 0.012 % at each
    end. So all resamples of 0, 0, 0 and 1 are inside but those of four ones, of which there are 2,000 / 256."""
    drawn = np.sort(Bootstrap(4, seed=0).means(np.array([0.0, 0, 0, 1])))
    assert interval(drawn) == [0, 0.75]
    assert interval(drawn, 4) == [0, 1]
    assert interval(drawn, 10**6) == [0, 0.75]


@pytest.mark.parametrize("prompts", [8, 64])
def test_intervals_of_means_changes_and_ratios_contain_the_truth(prompts):
    """400 evaluations each. The changes are of answers to the same prompts, of which a fifth has no score."""
    draws, bootstrap, where = np.random.default_rng(0), Bootstrap(prompts, seed=1), np.arange(prompts).repeat(4)
    inside = np.zeros(3)
    for _ in range(400):
        hard = 3 * draws.normal(size=prompts).repeat(4)
        own, base = hard + draws.normal(size=len(hard)) + 0.5, hard + draws.normal(size=len(hard))
        scored = draws.random(len(hard)) < 0.8
        tokens, per_token = draws.integers(5, 200, prompts), draws.gamma(2, size=prompts)
        found = [
            (mean(where, hard, bootstrap), 0.0),
            (change(where[scored], own[scored], where, base, bootstrap), 0.5),
            (mean(np.arange(prompts), tokens * per_token, bootstrap, counts=tokens), 2.0),
        ]
        inside += [low <= true <= high for f, true in found for low, high in [f["interval"]]]
    assert (inside / 400 >= 0.91).all()


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
    """The third prompt has no items, so a resample with it alone has no mean."""
    sums, bootstrap = np.array([[2.0, 1.0], [3.0, 1.0], [0.0, 0.0]]), Bootstrap(3, seed=0)
    assert figures(sums, bootstrap, ratio, sums[:, 1:]) == [figure(pytest.approx(2.5), [2.0, 3.0])]


def test_a_figure_of_one_prompt_or_none_has_no_interval():
    sums, bootstrap = np.array([[2.0, 1.0], [0.0, 0.0]]), Bootstrap(2, seed=0)
    assert figures(sums, bootstrap, ratio, sums[:, 1:]) == [figure(2.0, None)]
    assert figures(0 * sums, bootstrap, ratio, 0 * sums[:, 1:]) == [figure(None, None)]


def test_scores_from_0_to_1_have_the_interval_of_a_share():
    bootstrap, where = Bootstrap(3, seed=0), np.array([0, 0, 1])
    assert mean_score(where, np.array([0.0, 1, 1]), bootstrap) == share(np.array([1, 1]), np.array([2, 1]))
    assert mean_score(where, np.zeros(3), bootstrap) == figure(0, list(wilson_interval(0, 2)))
    others = np.array([0.0, 1, 2])
    assert mean_score(where, others, bootstrap) == mean(where, others, bootstrap)


def test_one_prompt_has_no_interval():
    assert mean(np.array([0, 0]), np.array([1.0, 2.0]), Bootstrap(1, seed=0)) == figure(1.5, None)
    assert jackknife(0.5, np.array([0.0])) == figure(0.5, None)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """Quenouille and Tukey: for a mean it equals the usual standard error, sample deviation / sqrt(n)."""
    values = [0.1, 0.4, 0.2, 0.8]
    without = np.array([statistics.fmean(values[:i] + values[i + 1 :]) for i in range(4)])
    error = statistics.stdev(values) / 2
    assert jackknife(0.375, without)["interval"] == pytest.approx([0.375 - 1.96 * error, 0.375 + 1.96 * error])


def test_the_jackknife_of_a_share_ends_at_0_and_1():
    assert jackknife(0.75, np.array([0.5, 1.0, 0.5, 1.0]))["interval"] == [0, 1]


def test_a_change_rose_or_fell_only_if_its_interval_leaves_zero():
    assert rose(figure(1, [0.1, 2]))
    assert fell(figure(-1, [-2, -0.1]))
    for neither in (figure(1, [-0.1, 2]), figure(1, [0, 2]), figure(-1, [-2, 0]), figure(1, None)):
        assert not rose(neither)
        assert not fell(neither)
