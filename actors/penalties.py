"""Ready-made reward functions for common faults of form, meant for negative weights in [[reward.sources]]. Runs where
reward functions run: in each reward replica or its worker processes.

This file stays here, and not in actors/scoring/, because users' configs name `actors.penalties:unfinished`.
"""

from __future__ import annotations

from common.types import RewardInput


def unfinished(answer: RewardInput) -> float:
    """1 if the response was cut off before its end token, or the episode before its end, else 0."""
    return float(answer.finish_reason not in ("stop", "terminated"))


def length(answer: RewardInput) -> float:
    """Tokens of the response, so that the source's weight is per token."""
    return float(answer.response_tokens)


def repetition(answer: RewardInput) -> float:
    """Share of the response's word trigrams that already occurred earlier in it, 0 to 1."""
    words = answer.response.lower().split()
    trigrams = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
