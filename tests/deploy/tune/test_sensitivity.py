"""What the trials say about each key, compared with slow derivations and cases worked by hand."""

from __future__ import annotations

import itertools
import random
from statistics import fmean, stdev

import numpy as np
import pytest

from deploy.tune import sensitivity
from deploy.tune.sensitivity import Column, effect_of

PAIRS = (0.0, 0.0, 1.0, 1.0)
CHOICES = ("a", "b")


def r2_of_groups(values, outcomes):
    """1 - squared distances from the group's mean / squared distances from the mean of all."""
    mean = fmean(outcomes)
    groups = {value: [y for x, y in zip(values, outcomes) if x == value] for value in values}
    within = sum((y - fmean(groups[x])) ** 2 for x, y in zip(values, outcomes))
    return 1 - within / sum((y - mean) ** 2 for y in outcomes)


def test_the_share_of_choices_is_adjusted_for_their_number():
    # Means 2 and 6, mean of all 4: total 9 + 1 + 1 + 9 = 20, within 1 + 1 + 1 + 1 = 4, so R2 = 0.8.
    # Adjusted: 1 - 0.2 x 3 / 2 = 0.7.
    found = effect_of(Column("k", PAIRS, CHOICES), [1, 3, 5, 7])
    assert found.explained == pytest.approx(0.7)
    assert [(mean["value"], mean["mean"], mean["trials"]) for mean in found.means] == [("a", 2, 2), ("b", 6, 2)]
    assert found.best == "b"


def test_p_is_the_share_of_all_orders_that_explain_as_much():
    values, outcomes = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0), [0.3, 0.1, 0.5, 0.6, 0.4, 0.9]
    observed = r2_of_groups(values, outcomes)
    every = [r2_of_groups(values, order) >= observed - 1e-12 for order in itertools.permutations(outcomes)]
    found = effect_of(Column("k", values, CHOICES), outcomes)
    assert found.p == pytest.approx(fmean(every), abs=0.04)  # 4 standard deviations of 1,000 draws
    assert found.mattered == (found.p <= 0.05)


def test_few_trials_of_many_values_cannot_tell():
    # Of 6! orders, those with the same pairs explain as much: 2 x 2 x 2 within the pairs, 3! of whole pairs.
    found = effect_of(Column("k", (0.0, 0.0, 1.0, 1.0, 2.0, 2.0), ("a", "b", "c")), [1, 1, 2, 2, 4, 4])
    assert found.smallest_p == pytest.approx(48 / 720, abs=0.03)
    assert found.p == pytest.approx(48 / 720, abs=0.03)
    assert not found.mattered
    assert not found.can_tell
    assert effect_of(Column("k", (0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0), CHOICES), [0.0] * 7).can_tell  # 3! 4! / 7!


def test_the_slope_is_that_of_least_squares():
    x, y = (-6.0, -5.5, -4.0, -3.0), [0.2, 0.4, 0.5, 0.9]
    # Among many lines, none has smaller squares than the found one through the means.
    found = effect_of(Column("k", x, log=True), y)

    def squares(slope):
        return sum((b - fmean(y) - slope * (a - fmean(x))) ** 2 for a, b in zip(x, y))

    near = [found.slope + change for change in (-1e-3, 1e-3)]
    assert all(squares(found.slope) < squares(slope) for slope in near)
    low, high = found.slope_interval
    assert low < found.slope < high


def test_an_exact_line_is_known_exactly():
    x = tuple(float(n) for n in range(10))
    found = effect_of(Column("k", x), [1 + 2 * value for value in x])
    assert found.explained == pytest.approx(1)
    assert found.slope == pytest.approx(2)
    assert found.slope_interval == pytest.approx((2, 2))
    assert found.best == 9
    assert found.mattered


def test_an_optimum_inside_a_range_counts_although_its_slope_is_zero():
    x = tuple(float(n) for n in range(-4, 5))
    found = effect_of(Column("k", x), [-(value**2) for value in x])
    assert found.explained == pytest.approx(1)
    assert found.slope == pytest.approx(0)
    assert found.best == 0
    assert found.mattered


def test_the_share_of_a_range_is_that_of_the_normal_equations():
    chance = random.Random(3)
    x = tuple(chance.uniform(-1, 1) for _ in range(11))
    y = [value - value**2 + chance.gauss(0, 0.3) for value in x]
    powers = np.array([[value**power for power in range(3)] for value in x])
    fit = powers @ np.linalg.solve(powers.T @ powers, powers.T @ np.array(y))
    r2 = 1 - sum((np.array(y) - fit) ** 2) / sum((np.array(y) - fmean(y)) ** 2)
    assert effect_of(Column("k", x), y).explained == pytest.approx(1 - (1 - r2) * 10 / 8)


def test_the_interval_of_a_mean_is_students():
    """The table of the t distribution has 3.182 for three degrees of freedom."""
    outcomes = [0.0, 1.0, 2.0, 4.0]
    found = effect_of(Column("k", (0.0,) * 4, ("a",)), outcomes).means[0]["interval"]
    reach = 3.182 * stdev(outcomes) / 2
    assert found == pytest.approx((1.75 - reach, 1.75 + reach), abs=0.01)


def test_the_interval_of_a_slope_covers_it_also_with_few_trials():
    """Of 200 searches with six trials each, at least 94 % must cover the true slope. The plain middle 95 % of a
    bootstrap covers it in 91 %."""
    chance = np.random.default_rng(1)
    x = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    covered = 0
    for seed in range(200):
        outcomes = 2 * np.array(x) + chance.normal(size=6)
        low, high = effect_of(Column("k", x), outcomes.tolist(), seed=seed).slope_interval
        covered += low <= 2 <= high
    assert covered >= 188


def test_a_key_without_effect_matters_by_chance_once_in_twenty(monkeypatch):
    monkeypatch.setattr(sensitivity, "RESAMPLES", 99)
    chance = np.random.default_rng(0)
    x = tuple(float(value) for value in np.arange(12) % 3)
    found = [effect_of(Column("k", x, ("a", "b", "c")), chance.normal(size=12).tolist(), seed=n) for n in range(200)]
    assert fmean(one.mattered for one in found) == pytest.approx(0.05, abs=0.05)  # 3 standard deviations
    assert fmean(one.explained for one in found) < 0.1
    assert fmean(one.explained_interval[0] > 0 for one in found) < 0.05


@pytest.mark.parametrize("outcomes", [[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
def test_one_value_or_one_outcome_explains_nothing(outcomes):
    one_value = effect_of(Column("k", (2.0,) * 4), outcomes)
    assert (one_value.explained, one_value.slope, one_value.best) == (0, None, 2)
    assert not one_value.mattered
    same = effect_of(Column("k", PAIRS, CHOICES), [1.0] * 4)
    assert (same.explained, same.p) == (0, 1)
