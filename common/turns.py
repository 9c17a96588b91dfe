"""The turns of an episode: where the policy wrote in a response, and where an environment answered. Runs anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CACHE_BLOCK = 32  # tokens of a block in an engine's cache of earlier turns, which keeps whole blocks. On a GPU it is 16


@dataclass(frozen=True)
class Turn:
    """One message of the policy, and the answer of the environment to it."""

    end: int  # place in the response after the last token of the policy's message
    next_start: int  # place of the policy's next token: those from `end` on until here are the environment's
    reward: float
    observation: str = "[]"  # the environment's messages, JSON
    info: str = "{}"  # JSON
    seconds: float = 0.0  # that the environment took to answer
    cached_tokens: int = 0  # of this turn's context, found in the engine's cache when the turn was sampled
    # The environment's tokens after this message are a whole new prompt: the policy's next message sees only these.
    new_context: bool = False
    # This message is the last of its sequence: it gets the episode's score too, and GAE does not continue past it. Only
    # with new_context; the last message of an episode ends its sequence without it.
    ends: bool = False
    # With new_context: another conversation begins, which has nothing of the messages before. Only the environment
    # needs it, so the journal does not have it.
    restarts: bool = False


def response_mask(length: int, holes: Iterable[tuple[int, int]]) -> np.ndarray:
    """True on the tokens of a response that the policy sampled, bool [length]. `holes`: the half-open ranges of places
    that an environment filled."""
    mask = np.ones(length, dtype=np.bool_)
    for first, end in holes:
        mask[first:end] = False
    return mask


def context_starts(turns: Iterable[tuple[int, bool]]) -> list[int]:
    """Places in a response where a new prompt begins. `turns`: `Turn.end` and `Turn.new_context` of each turn."""
    return [end for end, new_context in turns if new_context]


def turns_for_reward(
    turns: Sequence[Turn], response_ids: np.ndarray, decode: Callable[[list[int]], str]
) -> tuple[dict[str, Any], ...]:
    """The turns as reward functions get them (`RewardInput.turns`). `decode` gives the text of tokens."""
    return tuple(
        {
            "text": decode(response_ids[start:end].tolist()),
            "observation": json.loads(turn.observation),
            "reward": turn.reward,
            "info": json.loads(turn.info),
        }
        for start, end, turn in messages_of(turns, len(response_ids))
        if turn is not None
    )


def messages_of(turns: Sequence[Turn], length: int) -> Iterator[tuple[int, int, Turn | None]]:
    """The policy's messages in a response of this length, each as three values: the place of its first token, the place
    after its last one, and its Turn. The Turn is None for a newest message without an answer."""
    start = 0
    for turn in turns:
        yield start, turn.end, turn
        start = turn.next_start
    if start < length or not turns:
        yield start, length, None
