"""One answer to one held-out prompt: written, scored and measured. Runs in the driver."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np

from common.errors import GivenUpError, RolloutLostError
from common.types import Prompt, Rollout, RolloutRef, Score, Void
from learner.loop.roles import Generators, Reference

Answer = tuple[Rollout, Score | Void]


async def answer(
    prompt: Prompt,
    generators: Generators,
    score: Callable[[RolloutRef], Awaitable[Score | Void]],
    reference: Reference | None = None,
) -> tuple[Rollout, Score | Void, np.ndarray]:
    """Samples one response and scores it. Returns the rollout, its score and its log-probabilities under the reference
    (without a reference: its rollout_logprobs). Asks again if the tokens are lost. If generation is given up or a value
    is not finite, the score is a Void and all log-probabilities are zero. Waits for the pools."""
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
            return Rollout(prompt, none, zeros, none, "length", "none"), Void(prompt.sample_id, str(error)), zeros
        if isinstance(rollout, RolloutLostError) or isinstance(measured, RolloutLostError):
            continue
        if ref.fault or not finite:
            zeros = np.zeros_like(rollout.rollout_logprobs)
            reason = ref.fault or "the reference gave a log-probability that is not finite"
            return replace(rollout, rollout_logprobs=zeros), Void(prompt.sample_id, reason), zeros
        return rollout, scored, rollout.rollout_logprobs if measured is None else measured


async def _unmeasured() -> tuple[None, bool]:
    return None, True
