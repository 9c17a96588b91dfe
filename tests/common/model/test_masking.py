"""Masked statistics against Python's own, over the values that count."""

import math
import statistics

import pytest
import torch

from common.model.masking import (
    length_mask,
    masked_mean,
    masked_sum,
    masked_var,
    round_up,
    sequence_lengths,
    var_above_rounding,
    whiten,
)

LENGTHS = [4, 0, 1, 3]
GARBAGE = [math.nan, math.inf, -math.inf, 1e9]


def ragged(garbage):
    """A padded tensor, its mask, and the values that count as Python floats."""
    torch.manual_seed(0)
    x = torch.randn(4, 4, dtype=torch.float64) + 3
    mask = torch.zeros(4, 4, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = True
        x[row, length:] = garbage
    return x, mask, [float(x[b, t]) for b, n in enumerate(LENGTHS) for t in range(n)]


def test_a_length_mask_is_true_on_the_first_places_of_each_row():
    mask = length_mask(torch.tensor([2, 0, 3]), 3)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False], [False, False, False], [True, True, True]]


def test_a_length_mask_may_be_wider_than_every_row_and_may_have_no_width():
    assert length_mask(torch.tensor([1]), 3).tolist() == [[True, False, False]]
    assert length_mask(torch.tensor([0, 0]), 0).shape == (2, 0)


def test_each_token_knows_the_length_of_its_sequence():
    # Sequences of 2, 1 and 3 tokens; one of 4 tokens; no token; 2 tokens.
    mask = length_mask(torch.tensor([6, 4, 0, 2]), 7)
    ends = torch.zeros(4, 7, dtype=torch.bool)
    for row, place in ((0, 1), (0, 2), (0, 5), (1, 3), (3, 1)):
        ends[row, place] = True
    assert sequence_lengths(mask, ends).tolist() == [
        [2, 2, 1, 3, 3, 3, 0],
        [4, 4, 4, 4, 0, 0, 0],
        [0] * 7,
        [2, 2, 0, 0, 0, 0, 0],
    ]
    assert sequence_lengths(mask[:, :0], ends[:, :0]).shape == (4, 0)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_sum_mean_and_variance_see_only_what_counts(garbage):
    x, mask, counted = ragged(garbage)
    assert float(masked_sum(x, mask)) == pytest.approx(math.fsum(counted), abs=1e-12)
    assert float(masked_mean(x, mask)) == pytest.approx(statistics.fmean(counted), abs=1e-12)
    assert float(masked_var(x, mask)) == pytest.approx(statistics.pvariance(counted), abs=1e-12)


@pytest.mark.parametrize("statistic", [masked_sum, masked_mean, masked_var])
def test_a_statistic_of_nothing_is_zero(statistic):
    assert float(statistic(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool))) == 0.0


@pytest.mark.parametrize("garbage", GARBAGE)
def test_the_gradient_of_the_mean_is_one_over_the_count(garbage):
    x, mask, counted = ragged(garbage)
    x.requires_grad_()
    masked_mean(x, mask).backward()
    for b in range(4):
        for t in range(4):
            expected = 1 / len(counted) if t < LENGTHS[b] else 0.0
            assert float(x.grad[b, t]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_whitened_values_have_mean_zero_and_variance_one(garbage):
    x, mask, counted = ragged(garbage)
    white = whiten(x, mask)
    kept = [float(white[b, t]) for b, n in enumerate(LENGTHS) for t in range(n)]
    assert statistics.fmean(kept) == pytest.approx(0, abs=1e-7)
    assert statistics.pvariance(kept) == pytest.approx(1, abs=1e-7)
    assert [kept.index(v) for v in sorted(kept)] == [counted.index(v) for v in sorted(counted)]  # order is kept
    assert all(float(white[b, t]) == 0.0 for b, n in enumerate(LENGTHS) for t in range(n, 4))


def test_whitening_uses_the_population_variance():
    # mean 2, squared deviations 1 and 1, divided by 2 (not 1): variance 1, so -1 and +1.
    white = whiten(torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(white, torch.tensor([[-1.0, 1.0, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_equal_values_whiten_to_zero(count):
    mask = torch.arange(3)[None] < count
    assert whiten(torch.full((1, 3), 5.0), mask).tolist() == [[0.0, 0.0, 0.0]]


def test_a_count_is_rounded_up_to_a_multiple_and_stays_if_it_is_one():
    assert [round_up(count, 4) for count in (0, 1, 3, 4, 5, 8, 9)] == [0, 4, 4, 4, 8, 8, 12]
    assert round_up(7, 1) == 7


@pytest.mark.parametrize("number", [0.3, 7.7, 1000.1, 1e6 + 0.3])
def test_whitening_does_not_magnify_the_rounding_of_equal_numbers(number):
    """The mean of equal numbers is that number, so each is 0 deviations away from it."""
    for count in (777, 1536):
        mask = torch.ones(1, count, dtype=torch.bool)
        assert float(whiten(torch.full((1, count), number), mask).abs().max()) < 1e-3


def test_whitening_keeps_small_differences_between_large_numbers():
    """One number in four is larger by 1: mean n + 1/4, standard deviation sqrt(3) / 4."""
    x = torch.tensor([[0.0, 0, 0, 1]]).repeat(1, 256) + 2**20
    white = whiten(x, torch.ones_like(x, dtype=torch.bool))
    assert white.dtype == torch.float32
    assert white[0, :4].tolist() == pytest.approx([-(3**-0.5)] * 3 + [3**0.5], rel=1e-6)


def test_variance_above_rounding_is_the_variance_or_zero():
    x, mask, counted = ragged(math.nan)
    assert var_above_rounding(x, mask) == pytest.approx(statistics.pvariance(counted), abs=1e-12)
    rounded = torch.where(mask, 1000 + 0.001 * (x - 3), x)  # deviations of about 1e-6 of the mean
    assert float(masked_var(rounded, mask)) > 0
    assert var_above_rounding(rounded, mask) == 0.0
    assert var_above_rounding(x, torch.zeros_like(mask)) == 0.0
