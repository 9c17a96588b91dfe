"""The rewards of an environment as a reward source. Runs in each reward replica."""

from __future__ import annotations

from math import fsum

from common.reward_input import RewardInput
from common.types import RawScore
from common.user_code.errors import UserCodeError

ORIGIN = "environment"


class EnvironmentSource:
    """Adds up the rewards of the turns."""

    async def __call__(self, answer: RewardInput) -> RawScore:
        """The sum of the rewards. Raises UserCodeError for a response that no environment has answered."""
        if not answer.turns:
            raise UserCodeError("needs an environment, which has answered no turn of this response")
        return RawScore(fsum(turn["reward"] for turn in answer.turns), ORIGIN)
