"""Reads what an environment returns: messages, rewards and info, checked. Runs in each environment replica."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.data.json_values import json_values, shown
from common.data.messages import Message
from common.environment import Step
from common.errors import UserError
from common.user_code.errors import UserCodeError, error_text
from common.user_code.results import FLOAT32_MAX, as_number, kind_of_value


@dataclass(frozen=True)
class Restart:
    """An observation that begins a new context: the policy's next message sees this conversation, and nothing before
    it. `step` may return it in place of messages, and `reset` may in place of the prompt. Only Ratchet's own
    environments use it.

    Steps after it continue its conversation, with environment.sequence = "turn" too.

    The chat template renders `messages` as a prompt. With `token_ids`, which must not be empty, the prompt begins with
    these tokens unchanged. They end with an assistant's message, and `messages` follow it. So tokens that were sampled
    before are not encoded again from their text."""

    messages: Sequence[Message]
    ends: bool  # see Turn: the message before is the last of its sequence. No effect in `reset`
    token_ids: Sequence[int] | None = None  # refused with environment.sequence = "turn". No effect in `reset`
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of the chat template, such as `tools`


@dataclass(frozen=True)
class Continuation:
    """An observation that continues the conversation, with arguments of the chat template, such as `tools`. Only
    Ratchet's own environments use it."""

    messages: Sequence[Message]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyTurn:
    """What the policy wrote in its newest turn. `step` gets it in place of a message if the environment asks for it
    with `needs_turn = True`. Only Ratchet's own environments do."""

    text: str  # without special tokens
    marked_text: str  # with all special tokens but its end token
    context_ids: np.ndarray  # int32: everything that the model saw, and what it wrote
    num_sampled: int  # tokens that it wrote, the last ones of context_ids
    finish_reason: str  # as the generator gave it: stop or length


class LimitError(Exception):
    """An episode has no room for what its environment says. `limit`: prompt, max_tokens or max_turns. `num_tokens`: the
    tokens that are needed; `room`: the tokens that fit. Both are 0 for max_turns."""

    def __init__(self, limit: str, num_tokens: int = 0, room: int = 0) -> None:
        super().__init__(f"{limit}: {num_tokens} tokens, where {room} fit")
        self.limit, self.num_tokens, self.room = limit, num_tokens, room


@dataclass(frozen=True)
class CheckedStep:
    """A step whose values can be rendered, written to the journal and learned from."""

    messages: Sequence[Message]
    reward: float
    terminated: bool
    truncated: bool
    info: str  # JSON
    restart: Restart | None = None  # with these messages, if they begin a new context
    options: Mapping[str, Any] = field(default_factory=dict)  # see Continuation


def read_step(returned: Any, *, chat: bool) -> CheckedStep:
    """Checks what `step` returned. `chat`: prompts.format is "chat". Raises UserCodeError."""
    if not isinstance(returned, tuple) or len(returned) != len(Step._fields):
        what = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else kind_of_value(returned)
        raise UserCodeError(
            f"step returned {what}; return Step(observation, reward, terminated, truncated, info)",
            fault="step returned no Step",
        )
    step = Step(*returned)
    observation: Any = step.observation
    internal = isinstance(observation, (Restart, Continuation))
    with reading("step"):
        return CheckedStep(
            read_observation("step", observation.messages if internal else observation, chat=chat),
            _reward(step.reward),
            _flag("terminated", step.terminated),
            _flag("truncated", step.truncated),
            read_info("step returned", step.info),
            observation if isinstance(observation, Restart) else None,
            observation.options if internal else {},
        )


@contextmanager
def reading(method: str) -> Iterator[None]:
    """Raises UserCodeError for any error. The user's objects may have methods of their own, such as a mapping that
    reads a file."""
    try:
        yield
    except UserCodeError:
        raise
    except Exception as error:
        what = f"{method} returned something that cannot be read"
        raise UserCodeError(f"{what}: {error_text(error)}", fault=what) from error


def read_observation(method: str, observation: Any, *, chat: bool) -> list[Message]:
    """The messages of an observation. Raises UserCodeError that names the method. Call it within `reading`."""
    if observation is None or (isinstance(observation, str) and not observation):
        return []
    if isinstance(observation, str):
        return [_message(method, {"role": "user", "content": observation})]
    if not isinstance(observation, (list, tuple)):
        raise UserCodeError(
            f"{method} returned the observation {kind_of_value(observation)}; return text, a list of messages or None",
            fault=f"{method} returned an observation of another type",
        )
    if not chat:
        raise UserCodeError(
            f'{method} returned a list of messages as observation; set prompts.format = "chat", or return text'
        )
    return [_message(method, message) for message in observation]


def _message(method: str, message: Any) -> Message:
    what = f"{method} returned the message {shown(message)}"
    if not isinstance(message, Mapping):
        raise UserCodeError(f"{what}; a message is a dict with role and content", fault=f"{method} returned no message")
    try:
        checked = json_values(f"{method} returned a message", message)
    except UserError as error:
        raise UserCodeError(str(error)) from None
    if not isinstance(checked.get("role"), str) or not isinstance(checked.get("content"), str):
        raise UserCodeError(f"{what}; role and content must be text", fault=f"{method} returned a message without text")
    return checked


def _reward(value: Any) -> float:
    reward = as_number(value)
    if reward is None:
        raise UserCodeError(
            f"step returned the reward {kind_of_value(value)}, where a number is needed",
            fault=f"step returned a reward of {type(value)}",
        )
    if not math.isfinite(reward) or abs(reward) > FLOAT32_MAX:
        raise UserCodeError(f"step returned the reward {reward:g}; it must be finite and fit float32", permanent=False)
    return reward


def _flag(name: str, value: Any) -> bool:
    flag = value
    if hasattr(value, "item"):  # numpy has a type of its own
        with suppress(Exception):  # it has several elements
            flag = value.item()
    if not isinstance(flag, bool):
        raise UserCodeError(f"step returned {name} = {kind_of_value(value)}; it must be True or False")
    return flag


def read_info(gave: str, value: Any) -> str:
    """An info as JSON. Raises UserCodeError whose text begins with `gave`, such as "step returned"."""
    if value is not None and not isinstance(value, Mapping):
        raise UserCodeError(f"{gave} the info {kind_of_value(value)}; it must be a dict")
    what = f"{gave} an info that is not JSON"
    try:
        return json.dumps(json_values(what, value or {}), allow_nan=False)
    except (UserError, ValueError) as error:
        raise UserCodeError(str(error) if isinstance(error, UserError) else f"{what}: {error}", fault=what) from None
