"""The argument of a reward function. Runs anywhere.

Worker processes of reward functions load this file by path (actors/scoring/function_worker.py), so it imports only the
standard library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RewardInput:
    """The argument of a reward function: `def reward(answer: RewardInput) -> float`."""

    prompt: str
    response: str  # decoded, without special tokens
    response_tokens: int  # end tokens included; with an environment only the model's tokens
    finish_reason: str  # "stop" or "length"; with an environment see docs/environments.md
    fields: Mapping[str, Any]  # the prompt record's other fields, such as a reference answer
    messages: Sequence[Mapping[str, str]] | None = None  # the prompt as chat messages, with prompts.format = "chat"
    raw_response: str = ""  # decoded with every special token, the end token included
    prompt_ids: Sequence[int] = ()
    response_ids: Sequence[int] = ()
    # With an environment, one dict for each turn that it answered: "text" (what the model wrote), "observation" (its
    # messages to the model), "reward" and "info". `response` then holds all turns with the observations between them,
    # or with whole new prompts between them (docs/environments.md, several contexts).
    turns: Sequence[Mapping[str, Any]] = ()
