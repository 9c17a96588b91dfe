"""The conversations of an agent with the model in one episode: which of them a request continues. Runs in each
environment replica.

    first request   [question]                        a conversation begins
    answer          [question, answer]                its tokens are known from here on
    next request    [question, answer, result]        continues it: only `result` is new
    another one     [question, answer, other result]  continues it too, from the same answer
    another one     [summary]                         begins another conversation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.environments.chat_requests import ChatRequest
from common.data.messages import Message


@dataclass(frozen=True)
class Answered:
    """A conversation up to an answer of the model."""

    request: ChatRequest
    answer: Message
    token_ids: np.ndarray  # of the whole conversation: what was prompted and what was sampled, int32

    @property
    def length(self) -> int:
        """The number of its messages."""
        return len(self.request.messages) + 1

    def is_continued_by(self, request: ChatRequest) -> bool:
        """True if the request's messages begin with these, and it has the same tools."""
        return (
            len(request.messages) > self.length
            and request.messages[self.length - 1] == self.answer
            and request.messages[: self.length - 1] == self.request.messages
            and request.tools == self.request.tools
        )


class Conversations:
    """All answers of the model in an episode."""

    def __init__(self) -> None:
        self._answered: list[Answered] = []

    def add(self, answered: Answered) -> None:
        """Adds the newest answer."""
        self._answered.append(answered)

    def continued_by(self, request: ChatRequest) -> Answered | None:
        """The longest conversation that the request continues; the newest one of several. None: it begins another."""
        found = [answered for answered in self._answered if answered.is_continued_by(request)]
        return max(reversed(found), key=lambda answered: answered.length) if found else None

    def is_newest(self, answered: Answered) -> bool:
        """True if the model has written nothing since this answer."""
        return answered is self._answered[-1]


def new_messages(answered: Answered, request: ChatRequest) -> Sequence[Message]:
    """The messages of a request after those of the conversation that it continues."""
    return request.messages[answered.length :]
