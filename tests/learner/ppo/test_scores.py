"""The running statistics of scores, against those of all numbers, and what an outlier does to them."""

import math
import statistics

import numpy as np
import pytest
import torch

from learner.ppo.scores import RunningMoments, normalise, robust_moments


def test_running_moments_are_those_of_all_numbers_seen():
    rng = np.random.default_rng(0)
    batches = [rng.normal(3e8, 2.0, n) for n in (5, 1, 0, 40)]
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.from_numpy(batch))
    seen = [float(x) for batch in batches for x in batch]
    assert moments.count == len(seen) == 46
    assert moments.mean == pytest.approx(statistics.fmean(seen), rel=1e-12)
    assert moments.deviation == pytest.approx(statistics.pstdev(seen), rel=1e-6)


def test_normalised_scores_by_hand():
    # Seen: 1, 3, 5, 7. Mean 4, squares 9 + 1 + 1 + 9 = 20, deviation sqrt(5).
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    moments.update(torch.tensor([5.0, 7.0]))
    scores = torch.tensor([4.0, 9.0, -100.0], dtype=torch.float64)
    root = math.sqrt(5)
    centred = normalise(scores, moments, centre=True, clip=3.0)
    assert centred.tolist() == pytest.approx([0.0, 5 / root, -3.0], abs=1e-6)
    assert normalise(scores, moments, centre=False, clip=0).tolist() == pytest.approx(
        [4 / root, 9 / root, -100 / root], abs=1e-5
    )
    # Only -100 is more than 3 deviations from the mean, and is moved to that distance.
    assert normalise(scores, moments, centre=False, clip=3.0).tolist() == pytest.approx(
        [4 / root, 9 / root, 4 / root - 3], abs=1e-5
    )


def test_scores_that_are_only_divided_keep_their_differences_far_from_zero():
    """Their mean is 27 deviations from 0."""
    scores = torch.tensor([90.0, 92.0, 95.0, 97.0, 100.0], dtype=torch.float64)
    moments = RunningMoments()
    moments.update(scores)
    found = normalise(scores, moments, centre=False, clip=5.0)
    deviation = statistics.pstdev(scores.tolist())
    assert found.tolist() == pytest.approx([score / deviation for score in scores.tolist()], rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 3e8 + 0.1])
def test_scores_that_never_varied_become_zero(value):
    moments = RunningMoments()
    for _ in range(3):
        moments.update(torch.full((7,), value, dtype=torch.float64))
    scores = torch.full((2,), value, dtype=torch.float64)
    for centre in (True, False):
        assert normalise(scores, moments, centre=centre, clip=5.0).tolist() == [0.0, 0.0]


def test_an_outlier_counts_as_twenty_deviations_from_the_mean():
    # Seen: -1 and 1, so mean 0 and deviation 1. 1e38 then counts as 20: mean 20 / 3, and the squares about it are
    # (-1 - 20/3)^2 + (1 - 20/3)^2 + (20 - 20/3)^2 = 1 + 1 + 400 - 3 (20/3)^2 = 268.667.
    moments = RunningMoments()
    moments.update(torch.tensor([-1.0, 1.0]))
    moments.update(torch.tensor([1e38], dtype=torch.float64))
    assert (moments.count, moments.mean) == (3, pytest.approx(20 / 3, abs=1e-12))
    assert moments.squares == pytest.approx(402 - 400 / 3, abs=1e-9)


@pytest.mark.parametrize("outlier", [1e38, -1e38, 1e10])
@pytest.mark.parametrize("first", [False, True], ids=["later", "first-batch"])
def test_one_outlier_does_not_make_all_later_scores_look_equal(outlier, first):
    rng = np.random.default_rng(0)
    batches = [rng.normal(0.5, 0.1, 64) for _ in range(10)]
    plain, disturbed = RunningMoments(), RunningMoments()
    for number, batch in enumerate(batches):
        plain.update(torch.from_numpy(batch))
        if number == (0 if first else 3):
            batch = np.append(batch, outlier)
        disturbed.update(torch.from_numpy(batch))
    # 641 scores, one of them 20 deviations away: the variance is at most 1 + 400 / 641 = 1.62 times as large.
    assert plain.deviation < disturbed.deviation < 1.4 * plain.deviation
    assert abs(disturbed.mean - plain.mean) < 0.05 * plain.deviation


def test_scores_within_twenty_deviations_are_counted_unchanged():
    rng = np.random.default_rng(1)
    batches = [rng.normal(size=50), np.array([15.0, -15.0]), rng.normal(size=50)]
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.from_numpy(batch))
    seen = np.concatenate(batches)
    assert moments.mean == pytest.approx(seen.mean(), abs=1e-12)
    assert moments.deviation == pytest.approx(seen.std(), rel=1e-12)


def test_a_rare_success_after_equal_scores_counts_in_full():
    moments = RunningMoments()
    moments.update(torch.zeros(64))
    moments.update(torch.tensor([0.0] * 63 + [1.0]))
    assert moments.mean == pytest.approx(1 / 128, abs=1e-12)
    assert moments.deviation == pytest.approx(math.sqrt(1 / 128 * 127 / 128), abs=1e-12)


@pytest.mark.parametrize(
    ("values", "median", "deviation"),
    [
        ([1.0, 2.0, 3.0, 4.0, 100.0], 3.0, 1.4826),  # distances 2 1 0 1 97, sorted 0 1 1 2 97
        ([0.0, 0.0, 0.0, 1.0, 1e38], 0.0, 1.4826),  # more than half are equal: of 1 and 1e38 the lower one
        ([7.0, 7.0], 7.0, 0.0),
    ],
)
def test_robust_moments_by_hand(values, median, deviation):
    assert robust_moments(torch.tensor(values, dtype=torch.float64)) == pytest.approx((median, deviation), abs=1e-12)
