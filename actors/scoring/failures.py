"""Turns the failure of a source or judge (timeout, exception, score outside float32) into a Void with its reason.

Runs in each reward replica.
"""

from __future__ import annotations

import asyncio

from actors.scoring.kinds import Source
from common.metrics import meters
from common.plain_text import one_line
from common.types import RawScore, RewardInput, SampleId, ScoringError, Void
from common.user_code.errors import UserCodeError, error_text
from common.user_code.results import FLOAT32_MAX


async def finite_score(call: Source, answer: RewardInput, limit_s: float) -> RawScore:
    """The score of a source, within the limit and within float32. Raises UserCodeError, or any error of the source."""
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            found = await call(answer)
    except TimeoutError:
        if not limit.expired():
            raise
        raise UserCodeError(
            f"gave no score within {limit_s:g} s (0.9 * timeout_s), waiting for its turn included"
        ) from None
    if not abs(found.score) <= FLOAT32_MAX:  # NaN is refused here too
        raise UserCodeError(f"returned {found.score:g}")
    return found


def void_of(sample_id: SampleId, answer: RewardInput, name: str, error: Exception, *, is_judge: bool) -> Void:
    """Counts the failure of the source or judge with this name, and returns it as a Void."""
    meters.count("ratchet_reward_voids_total", source=name)
    if not isinstance(error, UserCodeError):
        error = UserCodeError(f"raised {error_text(error)}", fault=f"raised {type(error).__name__}")
    failed = f"{'judge' if is_judge else 'reward source'} {name}"
    reason, fault = (f"{failed} {one_line(text)}" for text in (error.reason, error.fault))
    kept = ScoringError(fault, error.details, answer.prompt, answer.raw_response)
    return Void(sample_id, reason, response=answer.response, error=kept)
