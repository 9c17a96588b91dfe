"""A guessing game in several turns: the environment answers every guess with "higher" or "lower". The score comes at
the end: 1 if the number was found, else 0. Prompts from a seeded generator.

Runs in the driver, and in each environment replica.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from common.environment import EpisodePrompt, Step

HELDOUT_PROMPTS = 128
NUMBERS = 7  # the number is one of this many
GUESSES = 3  # enough to find any of seven numbers by halving; random guesses find it in 3 of 7 games
SHOWN = 440  # smallest number of the example in every prompt
SMALLEST = [number for number in range(100, 990) if number != SHOWN]  # of the other games


class Guess:
    """One game. The number depends on the episode's seed, so the prompt does not contain it."""

    async def reset(self, prompt: EpisodePrompt) -> None:
        """Thinks of a number. The prompt stays as it is."""
        smallest = prompt.fields["smallest"]
        self._number = random.Random(prompt.seed).randrange(smallest, smallest + NUMBERS)
        self._guesses = 0

    async def step(self, message: Mapping[str, Any]) -> Step:
        """Answers a guess, which is the first number in the message. A message without a number costs a guess."""
        self._guesses += 1
        found = re.search(r"\d+", message["content"])
        guess = int(found[0][:9]) if found else None
        info = {"guess": guess, "number": self._number}
        if guess == self._number:
            return Step(reward=1.0, terminated=True, info=info)
        if self._guesses == GUESSES:
            return Step(terminated=True, info=info)
        if guess is None:
            return Step("Write a number.", info=info)
        return Step("higher" if guess < self._number else "lower", info=info)

    async def close(self) -> None:
        """Nothing to free."""

    def state(self) -> int:
        """The number of guesses so far. The number to find is not part of it, because the seed gives it again."""
        return self._guesses

    def restore(self, state: int) -> None:
        """Continues a game of another process."""
        self._guesses = state


def train_prompts(seed: int) -> list[dict[str, Any]]:
    """A game for every smallest number that is not held out."""
    return _games(seed)[HELDOUT_PROMPTS:]


def heldout_prompts(seed: int) -> list[dict[str, Any]]:
    """128 games with smallest numbers that are in no training prompt."""
    return _games(seed)[:HELDOUT_PROMPTS]


def _games(seed: int) -> list[dict[str, Any]]:
    order = random.Random(seed).sample(SMALLEST, len(SMALLEST))
    return [{"prompt": [*_EXAMPLE, _question(smallest)], "smallest": smallest} for smallest in order]


def _question(smallest: int) -> dict[str, str]:
    return {"role": "user", "content": f"Guess my number from {smallest} to {smallest + NUMBERS - 1}."}


# A game that shows the form of the answers.
_EXAMPLE = [
    {"role": "system", "content": "Guess."},
    _question(SHOWN),
    {"role": "assistant", "content": "445"},
    {"role": "user", "content": "lower"},
    {"role": "assistant", "content": "442"},
]
