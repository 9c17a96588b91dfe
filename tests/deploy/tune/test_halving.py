"""ASHA's decisions, compared with its definition."""

from __future__ import annotations

import random

import pytest

from deploy.tune.halving import Halving, rungs


@pytest.mark.parametrize(
    ("first", "num_steps", "expected"),
    [(2, 14, [2, 6]), (1, 9, [1, 3]), (1, 10, [1, 3, 9]), (5, 5, []), (1, 300, [1, 3, 9, 27, 81, 243])],
)
def test_each_rung_is_three_times_the_one_before_and_before_the_end(first, num_steps, expected):
    assert rungs(first, num_steps) == expected


def continues_by_definition(value, earlier):
    """It continues unless its value is below the one that two thirds of the earlier ones are below, where between two
    values the line counts (numpy's percentile)."""
    if not earlier:
        return True
    ranked = sorted(earlier)
    place = (len(ranked) - 1) * 2 / 3
    low, share = int(place), place - int(place)
    cutoff = ranked[low] * (1 - share) + ranked[min(low + 1, len(ranked) - 1)] * share
    return value >= cutoff - 1e-12


def random_results(at, seed):
    chance = random.Random(seed)
    for trial in range(40):
        for step in range(1, at[-1] + 5):
            yield f"{trial:03d}", step, chance.random()


@pytest.mark.parametrize("at", [[2, 6], [3], [1, 3, 9, 27, 81, 243]])
def test_decisions_are_those_of_the_definition(at):
    halving, earlier, decisions = Halving(at), {step: [] for step in at}, []
    for trial, step, value in random_results(at, seed=1):
        expected = step not in earlier or continues_by_definition(value, earlier[step])
        assert halving.continues(trial, step, value) == expected
        decisions.append(expected)
        if step in earlier:
            earlier[step].append(value)
    assert {True, False} == set(decisions)


def test_results_of_an_earlier_start_lead_to_the_same_decisions():
    results = list(random_results([2, 6], seed=2))
    whole, first = Halving([2, 6]), len(results) // 2
    decisions = [whole.continues(*result) for result in results]
    continued = Halving([2, 6], results[:first])
    assert [continued.continues(*result) for result in results[first:]] == decisions[first:]
    assert continued.stopped == {result[0] for result, on in zip(results[:first], decisions) if not on}


def test_without_rungs_every_trial_continues():
    halving = Halving([])
    assert all(halving.continues(*result) for result in random_results([1], seed=0))
