"""The protocol that threads (function_threads.py) and worker processes (function_processes.py) implement. Runs in each
reward replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.reward_input import RewardInput
from common.user_code.calls import CallStyle
from common.user_code.errors import UserCodeError
from common.user_code.results import Outcome


class Runner(Protocol):
    """Calls one function of the user. Several calls may be made at once."""

    style: CallStyle  # how the function is called

    async def run(self, answers: Sequence[RewardInput]) -> list[Outcome]:
        """Makes one call and returns the outcome of each answer. There is one answer, or several if the function takes
        a list. Raises UserCodeError if the call as a whole fails or passes its time limit."""

    def close(self) -> None:
        """Ends threads and processes."""


def too_long(limit_s: float) -> UserCodeError:
    """The error of a call that passed its time limit."""
    return UserCodeError(f"took longer than call_timeout_s ({limit_s:g} s)", permanent=False)
