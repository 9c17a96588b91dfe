"""A reward function of the experiments. Runs in each reward replica."""

from __future__ import annotations

from common.types import RewardInput


def one(answer: RewardInput) -> float:
    """The same score for every response; its weight moves the zero point of the reward."""
    return 1.0
