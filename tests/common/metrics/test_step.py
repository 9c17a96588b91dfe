"""Partial values of a step are reduced as the table says."""

import math

import pytest

from common.metrics.step import StepMetrics


def test_a_mean_is_weighted_by_its_counts():
    metrics = StepMetrics()
    metrics.add("ppo/ratio", 6.0, 2)  # mean 3 of two
    metrics.add("ppo/ratio", 2.0, 6)  # mean 1/3 of six: together 8 of eight, not the mean of the means
    metrics.add("ppo/entropy", 0.0, 0)
    assert metrics.result() == {"ppo/ratio": 1.0, "ppo/entropy": 0.0}


def test_a_maximum_keeps_the_largest_and_others_the_newest():
    metrics = StepMetrics()
    for value in (-3.0, -1.0, -2.0):
        metrics.add("ppo/grad_norm", value)
        metrics.add("kl/coef", value)
    assert metrics.result() == {"ppo/grad_norm": -1.0, "kl/coef": -2.0}


@pytest.mark.parametrize("values", [[math.nan], [1.0, math.nan, 2.0], [math.nan, 1.0]])
def test_a_maximum_does_not_hide_a_value_that_is_not_a_number(values):
    metrics = StepMetrics()
    for value in values:
        metrics.add("ppo/grad_norm", value)
    assert math.isnan(metrics.result()["ppo/grad_norm"])


def test_a_metric_that_is_not_in_the_table_is_refused():
    with pytest.raises(KeyError, match="ppo/made_up"):
        StepMetrics().add("ppo/made_up", 1.0)
