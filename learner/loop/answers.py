"""One answer to one held-out prompt, with its score and its reference log-probabilities. Runs in the driver."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from common.errors import GivenUpError, RolloutLostError
from common.types import Prompt, Rollout, RolloutRef, Score, Void
from learner.loop.roles import Generators, Reference

Answer = tuple[Rollout, Score | Void]


class Answered(NamedTuple):
    """One answer with everything that is known about it."""

    rollout: Rollout
    score: Score | Void
    ref_logprobs: np.ndarray  # float32 [R] nats, under the reference; without one, the rollout_logprobs


async def answer(
    prompt: Prompt,
    generators: Generators,
    score: Callable[[RolloutRef], Awaitable[Score | Void]],
    reference: Reference | None = None,
) -> Answered:
    """Gets one response, its score and, if there is a reference, its log-probabilities. Starts again if the tokens are
    lost. If generation is given up or a value is not finite, the score is a Void and all log-probabilities are zero.
    Waits for the pools."""
    while True:
        try:
            ref = await generators.generate(prompt)
            measuring = reference.logprobs(ref) if reference is not None else _unmeasured()
            scored, (ref_logprobs, finite) = await asyncio.gather(score(ref), measuring)
            rollout, measured = await generators.fetch([ref.rollout, ref_logprobs])
        except RolloutLostError:
            continue
        except GivenUpError as error:
            none = np.zeros(0, dtype=np.int32)
            zeros = np.zeros(0, dtype=np.float32)
            void = Void(prompt.sample_id, str(error), kind=error.kind)
            return Answered(Rollout(prompt, none, zeros, none, "length", "none"), void, zeros)
        if isinstance(rollout, RolloutLostError) or isinstance(measured, RolloutLostError):
            continue
        if ref.fault or not finite:
            zeros = np.zeros_like(rollout.rollout_logprobs)
            reason = ref.fault or "the reference gave a log-probability that is not finite"
            return Answered(replace(rollout, rollout_logprobs=zeros), Void(prompt.sample_id, reason), zeros)
        return Answered(rollout, scored, rollout.rollout_logprobs if measured is None else measured)


async def _unmeasured() -> tuple[None, bool]:
    return None, True


def score_record(score: Score | Void) -> dict[str, Any]:
    """The score of an answer for a file of answers, or the reason why there is none."""
    if isinstance(score, Void):
        return {"void": score.reason}
    record = {"score": score.total, "components": dict(score.components), "origins": dict(score.origins)}
    if score.judge_voids:
        record["judge_voids"] = {judge: void.reason for judge, void in score.judge_voids.items()}
    return record
