"""The interval of a proportion, against published numbers and its definition."""

import math

import pytest

from common.proportions import wilson_interval


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
def test_the_ends_of_the_interval_are_z_standard_errors_away(z):
    for p in wilson_interval(7, 30, z=z):
        assert abs(7 / 30 - p) == pytest.approx(z * math.sqrt(p * (1 - p) / 30), abs=1e-12)


def test_the_interval_stays_within_zero_and_one():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for trials in range(1, 50):
        assert wilson_interval(0, trials)[0] == pytest.approx(0, abs=1e-12)
        assert wilson_interval(0, trials)[0] >= 0
        assert wilson_interval(trials, trials)[1] == pytest.approx(1, abs=1e-12)
        assert wilson_interval(trials, trials)[1] <= 1
