"""The crossover against a loop over k, also in every resample."""

from __future__ import annotations

import numpy as np
import pytest

from learner.evaluation.bootstrap import Bootstrap
from learner.evaluation.crossover import crossover, first_above
from learner.evaluation.pass_at_k import pass_at_k


def crosses_at(base, target):
    """The smallest k from which on the base is above its target; None if it is not at the end."""
    found = None
    for k in range(len(base), 0, -1):
        if not base[k - 1] > target[k - 1] + 1e-9:
            return found
        found = k
    return found


@pytest.mark.parametrize(
    ("base", "target", "k"),
    [
        ([0.2, 0.5, 0.8], [0.5, 0.5, 0.5], 3),  # equal is not above
        ([0.2, 0.6, 0.8], [0.5, 0.5, 0.5], 2),
        ([0.6, 0.6, 0.8], [0.5, 0.5, 0.5], 1),
        ([0.2, 0.3, 0.4], [0.5, 0.5, 0.5], 4),  # none up to 3
        ([0.6, 0.4, 0.8], [0.5, 0.5, 0.5], 3),  # it was above before, but not from there on
        ([0.6, 0.8, 0.4], [0.5, 0.5, 0.5], 4),
        ([0.1 + 0.2, 0.5, 0.5], [0.3, 0.3, 0.3], 2),  # a difference of rounding is none
    ],
)
def test_the_crossover_is_where_the_base_stays_above(base, target, k):
    assert first_above(np.array(base), np.array(target)) == k
    assert (crosses_at(base, target) or 4) == k


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("trained_passes", [0.4, 0.95])
def test_the_interval_is_that_of_the_crossovers_of_the_resamples(equal, trained_passes):
    draws = np.random.default_rng(2)
    prompts, samples = 9, 6
    base = pass_at_k(draws.binomial(samples, 0.25, prompts), samples)
    trained = pass_at_k(draws.binomial(samples, trained_passes, prompts), samples)
    found = crossover(base, trained, Bootstrap(prompts, seed=9, resamples=100), equal=equal)

    def of(rows):
        base_mean = [sum(base[p, k] for p in rows) / prompts for k in range(samples)]
        trained_mean = [sum(trained[p, k if equal else 0] for p in rows) / prompts for k in range(samples)]
        return crosses_at(base_mean, trained_mean)

    counts = np.random.default_rng(9).multinomial(prompts, [1 / prompts] * prompts, 100)
    drawn = [of([p for p, n in enumerate(row) for _ in range(n)]) for row in counts]
    in_order = sorted(drawn, key=lambda k: k or samples + 1)
    assert found == {
        "value": of(range(prompts)),
        "interval": [in_order[2], in_order[97]],  # the third and the 98th of 100: 2.5 % and 97.5 %
        "share": sum(k is not None for k in drawn) / 100,
        "up_to": samples,
    }


def test_a_policy_that_is_always_right_is_never_beaten():
    base, trained = pass_at_k(np.array([1, 2, 3]), 4), pass_at_k(np.array([4, 4, 4]), 4)
    found = crossover(base, trained, Bootstrap(3, seed=0))
    assert found == {"value": None, "interval": [None, None], "share": 0.0, "up_to": 4}
