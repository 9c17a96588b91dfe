"""The shipped task: which of two numbers is larger?"""

import re

import pytest

from common.types import RewardInput
from deploy.tasks.larger import correct, heldout_prompts, train_prompts


def pair(record):
    return tuple(map(int, re.findall(r"\d+", record["prompt"])))


def answer(response, *, larger=42, finish_reason="stop"):
    return RewardInput("Which number is larger, 17 or 42?", response, 3, finish_reason, {"larger": larger})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_train_and_heldout_pairs_are_disjoint_in_either_order(seed):
    train = {frozenset(pair(record)) for record in train_prompts(seed)}
    heldout = {frozenset(pair(record)) for record in heldout_prompts(seed)}
    assert train & heldout == set()
    assert len(heldout) == 256
    assert len(train) == 90 * 89 // 2 - 256  # every pair of 10..99 that is not held out
    assert {number for numbers in train | heldout for number in numbers} == set(range(10, 100))


def test_no_pair_is_asked_twice():
    records = train_prompts(0) + heldout_prompts(0)
    assert len({frozenset(pair(record)) for record in records}) == len(records) == 4005


def test_prompts_are_a_function_of_the_seed():
    assert train_prompts(5) == train_prompts(5)
    assert heldout_prompts(5) == heldout_prompts(5)
    assert train_prompts(5) != train_prompts(6)
    pairs = [{frozenset(pair(record)) for record in heldout_prompts(seed)} for seed in (5, 6)]
    assert len(pairs[0] & pairs[1]) < 64  # 256 * 256 / 4005 = 16 expected by chance


@pytest.mark.parametrize("prompts", [train_prompts, heldout_prompts])
def test_the_larger_number_comes_first_about_half_the_time(prompts):
    records = prompts(0)
    assert all(record["larger"] == max(pair(record)) for record in records)
    first, second = pair(records[0])
    assert records[0]["prompt"] == f"Question: Which number is larger, {first} or {second}?\nAnswer:"
    share = sum(record["larger"] == pair(record)[0] for record in records) / len(records)
    assert 0.4 < share < 0.6  # 3 standard deviations of 256 tosses are 0.09


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("42", 1.0),
        (" 42.", 1.0),
        ("17 is smaller than 42", 1.0),  # the last number counts
        ("42 is larger than 17", 0.0),
        ("17", 0.0),
        ("142", 0.0),
        ("042", 1.0),
        ("the second one", 0.0),
        ("", 0.0),
    ],
)
def test_correct_compares_the_last_number_written_with_the_larger_one(response, score):
    assert correct(answer(response)) == score


def test_correct_does_not_ask_whether_the_answer_was_cut_off():
    assert correct(answer("42", finish_reason="length")) == 1.0
