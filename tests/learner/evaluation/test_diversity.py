"""Diversity of answers, against sets of tuples and loops."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from common.types import Turn
from learner.evaluation.bootstrap import Bootstrap
from learner.evaluation.diversity import different_answers, distinct, entropy, messages
from learner.evaluation.shares import share
from tests.fakes import make_prompt, make_rollout

RANDOM = np.random.default_rng(1)
PROMPTS = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
OF_PROMPTS = Bootstrap(3, seed=0)
SAMPLES = np.array([0, 1, 2] * 3)
ANSWERS = [RANDOM.integers(0, 4, size=length).astype(np.int32) for length in (6, 1, 0, 9, 3, 12, 2, 7, 5)]


def by_sets(answers, n):
    grams = [tuple(ids[i : i + n].tolist()) for ids in answers for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def by_loops(prompts, n):
    """The mean over samples of the share in one answer to each of these prompts."""
    chosen = [
        [ANSWERS[i] for i in range(len(ANSWERS)) if SAMPLES[i] == sample and PROMPTS[i] in prompts]
        for sample in range(3)
    ]
    return statistics.fmean(by_sets(answers, n) for answers in chosen)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_and_its_interval_are_those_of_sets(n):
    found = distinct(PROMPTS, SAMPLES, [[ids] for ids in ANSWERS], n, count=3)
    assert found["value"] == pytest.approx(by_loops((0, 1, 2), n))
    without = [by_loops(rest, n) for rest in ((1, 2), (0, 2), (0, 1))]
    error = math.sqrt(2 / 3 * sum((share - statistics.fmean(without)) ** 2 for share in without))
    low, high = found["value"] - 1.96 * error, found["value"] + 1.96 * error
    assert found["interval"] == pytest.approx([max(0, low), min(1, high)])


@pytest.mark.parametrize(
    ("responses", "n", "expected"),
    [
        ([[4, 4, 4, 4]], 1, 1 / 4),
        ([[4, 4, 4, 4]], 2, 1 / 3),
        ([[4, 5], [5, 4]], 2, 1.0),
        ([[4], []], 2, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_ngrams_worked_by_hand(responses, n, expected):
    prompts = np.arange(len(responses))
    answers = [[np.array(ids, dtype=np.int32)] for ids in responses]
    assert distinct(prompts, 0 * prompts, answers, n, count=len(answers))["value"] == expected


@pytest.mark.parametrize("n", [2, 3])
def test_ngrams_of_large_token_ids_stay_apart(n):
    ids = RANDOM.choice([0, 1, 2, 2**8, 2**12, 2**18, 2**20 + 1], 200).astype(np.int32)
    found = distinct(np.zeros(1, int), np.zeros(1), [[ids]], n, count=1)
    assert found["value"] == pytest.approx(by_sets([ids], n))


def test_answers_without_tokens_have_no_ngrams():
    assert distinct(np.arange(2), np.zeros(2), [[np.zeros(0, np.int32)]] * 2, 2, count=2)["value"] == 0
    assert distinct(np.zeros(0, int), np.zeros(0), [], 1, count=3)["value"] == 0


def random_episode(index):
    """A rollout of up to four turns with few different tokens. The environment's are among them."""
    ids, turns = RANDOM.integers(0, 3, size=30).astype(np.int32), []
    places = np.sort(RANDOM.integers(0, len(ids) + 1, size=2 * RANDOM.integers(0, 4)))
    for end, following in zip(places[::2].tolist(), places[1::2].tolist()):
        turns.append(Turn(end, following, 0.0))
    return replace(make_rollout(make_prompt(index), ids.tolist()), turns=tuple(turns))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_crosses_what_the_environment_said(n):
    for _ in range(20):
        rollouts = [random_episode(index) for index in range(3)]
        grams = []
        for rollout in rollouts:
            mask = rollout.response_mask
            # Slowly: every window of the whole response in which the policy sampled all tokens.
            windows = [range(place, place + n) for place in range(len(rollout.response_ids) - n + 1)]
            # An answer without tokens ends a message too.
            borders = {turn.end for turn in rollout.turns}
            kept = [w for w in windows if mask[list(w)].all() and not borders & set(w[1:])]
            grams += [tuple(rollout.response_ids[list(w)].tolist()) for w in kept]
        found = distinct(np.arange(3), np.zeros(3), [messages(rollout) for rollout in rollouts], n, count=3)
        assert found["value"] == pytest.approx(len(set(grams)) / len(grams))


def test_different_answers_are_counted_for_each_prompt():
    answers = [np.int32(ids) for ids in ([4, 1], [5, 1], [4, 1], [5, 1], [5, 1], [5, 1], [], [7], [7, 8])]
    found = different_answers(PROMPTS, answers)
    assert found["value"] == pytest.approx((2 / 3 + 1 / 3 + 3 / 3) / 3)
    assert found == share(np.array([2 / 3, 1 / 3, 1]))
    assert different_answers(np.arange(9), answers) is None


def test_the_entropy_estimate_is_that_of_the_sampled_distribution():
    p = np.array([0.5, 0.25, 0.125, 0.125])
    logprobs = np.log(p)[RANDOM.choice(4, size=(200, 100), p=p)].astype(np.float32)
    found = entropy(np.arange(200), list(logprobs), Bootstrap(200, seed=0))
    assert found["value"] == pytest.approx(1.75 * math.log(2), abs=0.02)
    low, high = found["interval"]
    assert low < 1.75 * math.log(2) < high
    short = [np.float32([-1, -2]), np.float32([-4]), np.float32([])]
    assert entropy(np.arange(3), short, OF_PROMPTS)["value"] == pytest.approx(7 / 3)
