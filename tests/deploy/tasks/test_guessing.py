"""The shipped task of several turns: guess a number."""

import asyncio

import pytest

from common.environment import EpisodePrompt, Step
from deploy.tasks.guessing import GUESSES, NUMBERS, Guess, heldout_prompts, train_prompts


def game(*, seed=3, smallest=500):
    environment = Guess()
    asyncio.run(environment.reset(EpisodePrompt("", None, {"smallest": smallest}, seed)))
    return environment


def step(environment, text):
    return asyncio.run(environment.step({"role": "assistant", "content": text}))


def play(environment, guesses):
    return [step(environment, str(guess)) for guess in guesses]


def hidden(seed):
    return step(game(seed=seed), "0").info["number"]


@pytest.mark.parametrize("seed", range(30))
def test_halving_the_numbers_always_finds_it(seed):
    environment, low, high = game(seed=seed), 500, 500 + NUMBERS - 1
    steps = []
    while not (steps and steps[-1].terminated):
        middle = (low + high) // 2
        steps.append(step(environment, f"I guess {middle}."))
        low, high = (middle + 1, high) if steps[-1].observation == "higher" else (low, middle - 1)
    assert [each.reward for each in steps] == [0.0] * (len(steps) - 1) + [1.0]
    assert len(steps) <= GUESSES


def test_the_hidden_numbers_are_all_of_the_range():
    assert {hidden(seed) for seed in range(200)} == set(range(500, 500 + NUMBERS))


def test_the_number_depends_on_the_seed_alone():
    assert [hidden(seed) for seed in range(9)] == [hidden(seed) for seed in range(9)]


def test_a_game_without_the_number_ends_without_a_reward():
    number = hidden(3)
    first, second, third = play(game(seed=3), [number + 50, number - 50, number + 1])
    assert first == Step("lower", info={"guess": number + 50, "number": number})
    assert second == Step("higher", info={"guess": number - 50, "number": number})
    assert third == Step(terminated=True, info={"guess": number + 1, "number": number})


def test_a_turn_without_a_number_is_a_lost_guess():
    environment = game()
    assert step(environment, "Hm.").observation == "Write a number."
    assert step(environment, "9" * 10_000).observation == "lower"
    assert step(environment, "").terminated


def test_a_game_continues_in_another_process():
    first, second = game(seed=3), game(seed=3)
    play(first, [0, 0])
    second.restore(first.state())
    last = step(second, "0")
    assert (last.terminated, last.info["number"]) == (True, hidden(3))


@pytest.mark.parametrize("seed", [0, 1])
def test_heldout_games_are_about_other_numbers(seed):
    train, heldout = ({record["smallest"] for record in prompts(seed)} for prompts in (train_prompts, heldout_prompts))
    assert (len(train), len(heldout), train & heldout) == (889 - 128, 128, set())
    assert train | heldout == set(range(100, 990)) - {440}  # the example in every prompt
    record = train_prompts(seed)[0]
    smallest = record["smallest"]
    assert record["prompt"][-1]["content"] == f"Guess my number from {smallest} to {smallest + 6}."
