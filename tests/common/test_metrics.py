"""Reducers of partial values, JSON lines, and the interval of a proportion."""

import math

import pytest

from common.files import append_record, read_records
from common.metrics import Metrics
from learner.loop.evaluation import wilson_interval


def test_a_mean_is_weighted_by_its_counts():
    metrics = Metrics()
    metrics.mean("a", 6.0, 2)  # mean 3 of two
    metrics.mean("a", 2.0, 6)  # mean 1/3 of six: together 8 of eight, not the mean of the means
    metrics.mean("nothing", 0.0, 0)
    assert metrics.result() == {"a": 1.0, "nothing": 0.0}


def test_a_maximum_keeps_the_largest_and_last_keeps_the_newest():
    metrics = Metrics()
    for value in (-3.0, -1.0, -2.0):
        metrics.maximum("largest", value)
        metrics.last("newest", value)
    assert metrics.result() == {"largest": -1.0, "newest": -2.0}


@pytest.mark.parametrize("values", [[math.nan], [1.0, math.nan, 2.0], [math.nan, 1.0]])
def test_a_value_that_is_not_a_number_is_not_hidden_by_the_maximum(values):
    metrics = Metrics()
    for value in values:
        metrics.maximum("ppo/grad_norm", value)
    assert math.isnan(metrics.result()["ppo/grad_norm"])


def test_records_come_back_in_order_and_a_missing_file_has_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    records = [{"step": 0, "text": "zwei\nZeilen"}, {"step": 1, "value": 0.1}]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3: score interval without continuity correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_wilson_interval_equals_published_numbers(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)
    # The interval of the failures is its mirror image.
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-4)


@pytest.mark.parametrize("z", [1.0, 1.96, 2.576])
def test_the_ends_of_the_interval_are_the_shares_that_lie_z_standard_errors_from_what_was_seen(z):
    for p in wilson_interval(7, 30, z=z):
        assert abs(7 / 30 - p) == pytest.approx(z * math.sqrt(p * (1 - p) / 30), abs=1e-12)


def test_the_interval_stays_within_zero_and_one():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for trials in range(1, 50):
        assert wilson_interval(0, trials)[0] == pytest.approx(0, abs=1e-12)
        assert wilson_interval(0, trials)[0] >= 0
        assert wilson_interval(trials, trials)[1] == pytest.approx(1, abs=1e-12)
        assert wilson_interval(trials, trials)[1] <= 1
