"""Which of two numbers is larger? Prompts from a seeded generator, and the function that scores an answer.

Runs in the driver, and in each reward replica.
"""

from __future__ import annotations

import random
import re
from itertools import combinations
from typing import Any

from common.types import RewardInput

HELDOUT_PAIRS = 256


def train_prompts(seed: int) -> list[dict[str, Any]]:
    """Every pair of two-digit numbers that is not held out, in one of its two orders."""
    return _questions(_pairs(seed)[HELDOUT_PAIRS:], seed)


def heldout_prompts(seed: int) -> list[dict[str, Any]]:
    """256 pairs that are in no training prompt, in neither order."""
    return _questions(_pairs(seed)[:HELDOUT_PAIRS], seed)


def correct(answer: RewardInput) -> float:
    """1 if the last number written is the larger one, else 0."""
    numbers = re.findall(r"\d+", answer.response)
    return float(bool(numbers) and int(numbers[-1]) == answer.fields["larger"])


def _pairs(seed: int) -> list[tuple[int, int]]:
    pairs = list(combinations(range(10, 100), 2))
    random.Random(seed).shuffle(pairs)
    return pairs


def _questions(pairs: list[tuple[int, int]], seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    questions = []
    for small, large in pairs:
        first, second = (small, large) if rng.random() < 0.5 else (large, small)
        text = f"Question: Which number is larger, {first} or {second}?\nAnswer:"
        questions.append({"prompt": text, "larger": large})
    return questions
