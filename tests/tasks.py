"""Prompts and rewards of the tests' runs, named in their configs as any user's would be."""

from __future__ import annotations

from common.types import RewardInput


def train_prompts(seed: int) -> list[dict]:
    return [{"prompt": f"ask a{i} b{j}"} for i in range(10) for j in range(10)]


def heldout_prompts(seed: int) -> list[dict]:
    return [{"prompt": f"ask a{i} b{j}"} for i in range(20, 28) for j in range(20, 22)]


def a_words(answer: RewardInput) -> float:
    """Share of the response's words that are a-words."""
    words = answer.response.split()
    return sum(word.startswith("a") for word in words) / max(1, len(words))


def fails_on_some(answer: RewardInput) -> float:
    if answer.prompt.endswith("b3"):
        raise ValueError("b3 is not to be scored")
    return a_words(answer)


def words_of_some(answer: RewardInput) -> dict[str, float]:
    """A score and another figure."""
    return {"score": fails_on_some(answer), "words": len(answer.response.split())}


def not_a_number(answer: RewardInput) -> float:
    return float("nan")
