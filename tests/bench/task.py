"""The prompts of both sides of `step_vs_plain`, and their score."""

from __future__ import annotations

import random
from typing import Any

from common.types import RewardInput

PROMPTS = 32
SHORTEST, LONGEST = 30, 70  # words, each one token of SmolLM2's tokenizer
WORDS = ["time", "people", "way", "water", "day", "part", "place", "work", "year", "world", "life", "hand", "house"]


def prompts(seed: int) -> list[dict[str, Any]]:
    """32 prompts, the same for every seed: each step uses all of them."""
    rng = random.Random(0)
    step = (LONGEST - SHORTEST) / (PROMPTS - 1)
    lengths = [round(SHORTEST + index * step) for index in range(PROMPTS)]
    return [{"prompt": " ".join(rng.choices(WORDS, k=length))} for length in lengths]


def variety(text: str) -> float:
    """Share of different words: a reward that costs nothing to compute."""
    words = text.split()
    return len(set(words)) / max(1, len(words))


def reward(answer: RewardInput) -> float:
    return variety(answer.response)
