"""KL by position and perplexity, against loops over single tokens."""

import math

import numpy as np
import pytest

from learner.evaluation.bootstrap import Bootstrap
from learner.evaluation.forgetting import kl_by_position, perplexity, perplexity_ratio, position_bins

RANDOM = np.random.default_rng(0)
LENGTHS = [1, 30, 0, 9, 17, 8]
KL = [RANDOM.normal(size=length).astype(np.float32) for length in LENGTHS]
PROMPTS = np.array([0, 0, 1, 1, 2, 2])
OF_PROMPTS = Bootstrap(3, seed=0)


def test_bins_are_single_tokens_first_and_quarters_of_an_octave_later():
    assert position_bins(0).tolist() == []
    assert position_bins(3).tolist() == [0, 1, 2]
    assert position_bins(17).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16]
    assert position_bins(33).tolist()[-4:] == [20, 24, 28, 32]
    assert len(position_bins(2048)) == 40


@pytest.mark.parametrize("longest", [1, 8, 9, 100, 1000])
def test_every_position_is_in_one_bin(longest):
    starts = position_bins(longest).tolist()
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] < longest


def test_the_kl_of_a_bin_is_the_mean_over_the_answers_that_reach_it():
    found = kl_by_position(PROMPTS, KL, OF_PROMPTS)
    assert [part["first"] for part in found] == position_bins(30).tolist()
    assert found[-1]["last"] == 29
    for part in found:
        tokens = [float(kl[t]) for kl in KL for t in range(len(kl)) if part["first"] <= t <= part["last"]]
        assert part["tokens"] == len(tokens)
        assert part["value"] == pytest.approx(sum(tokens) / len(tokens), abs=1e-12)
    assert sum(part["tokens"] for part in found) == sum(LENGTHS)


def test_the_interval_of_a_position_is_that_of_whole_prompts():
    """First tokens with a KL of 1 and 3 for one prompt, 4 and 4 for the other: resamples are 2, 3 and 4."""
    kl = [np.float32([x]) for x in (1, 3, 4, 4)]
    [part] = kl_by_position(np.array([0, 0, 1, 1]), kl, Bootstrap(2, seed=0))
    assert part == {"first": 0, "last": 0, "tokens": 4, "value": 3, "interval": [2, 4]}


def test_answers_without_tokens_have_no_positions():
    assert kl_by_position(PROMPTS[:2], [np.zeros(0, np.float32)] * 2, OF_PROMPTS) == []
    assert kl_by_position(PROMPTS[:0], [], OF_PROMPTS) == []


def test_perplexity_counts_every_token_once_however_long_its_window():
    """Two windows, worked by hand: 3 tokens of probability 1/2 and 1 token of 1/32. The mean nll is 8/4 ln 2."""
    nll = np.array([3 * math.log(2), math.log(32)])
    found = perplexity(nll, np.array([3, 1]), Bootstrap(2, seed=0))
    assert found["value"] == pytest.approx(4)
    # A resample draws the first window twice (perplexity 2) or the second twice (32), each in a quarter of the cases.
    assert found["interval"] == pytest.approx([2, 32])


def test_the_ratio_of_perplexities_is_that_of_the_two():
    tokens, bootstrap = RANDOM.integers(5, 50, size=40), Bootstrap(40, seed=0)
    base = tokens * RANDOM.gamma(9, 0.3, size=40)
    nll = base + 0.1 * tokens
    ratio = perplexity_ratio(nll, base, tokens, bootstrap)
    both = [perplexity(x, tokens, bootstrap)["value"] for x in (nll, base)]
    assert ratio["value"] == pytest.approx(both[0] / both[1])
    # Each token is e^0.1 times less likely in every window, so nothing about the ratio is uncertain.
    assert ratio["interval"] == pytest.approx([math.exp(0.1), math.exp(0.1)])


def test_a_perplexity_beyond_the_largest_number_is_none():
    """exp(710) is beyond the largest float, exp(700) is not."""
    tokens, bootstrap = np.array([1, 1]), Bootstrap(2, seed=0)
    assert perplexity(np.array([800.0, 900]), tokens, bootstrap) == {"value": None, "interval": None}
    assert perplexity_ratio(np.array([800.0, 900]), np.zeros(2), tokens, bootstrap)["value"] is None
    half = perplexity(np.array([650.0, 750]), tokens, bootstrap)
    assert half == {"value": pytest.approx(math.exp(700)), "interval": None}


def test_one_window_has_a_perplexity_without_an_interval():
    found = perplexity(np.array([2.0]), np.array([2]), Bootstrap(1, seed=0))
    assert found == {"value": pytest.approx(math.e), "interval": None}
