"""The reference policy of a run that trains LoRA adapters: the learner without them. Runs in the driver."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ray.exceptions import ObjectLostError

from common.errors import RankLostError, RolloutLostError
from common.model.batcher import Batcher
from common.types import RolloutRef
from learner.ranks.group import LearnerGroup


class AdapterReference:
    """`learner.loop.roles.Reference` of a policy with LoRA adapters: the learner's own ranks with the adapters off.

    It takes turns with the learner's other calls: rollouts that arrive during an update wait for its end. If the group
    is lost, they wait until it has started again.
    """

    def __init__(self, learner: LearnerGroup) -> None:
        self._learner = learner
        self._batcher: Batcher[RolloutRef, np.ndarray] = Batcher(
            self._measure,
            num_tokens=lambda ref: ref.num_tokens,
            max_tokens=1 << 16,
            window_s=0.05,
        )

    async def logprobs(self, ref: RolloutRef) -> tuple[np.ndarray, bool]:
        """Float32 [R], nats, and whether all are finite. Raises RolloutLostError if any rollout of the same pass is
        lost."""
        try:
            logprobs = await self._batcher.submit(ref)
        except ObjectLostError as error:
            raise RolloutLostError("its tokens were lost with the node that held them") from error
        return logprobs, bool(np.isfinite(logprobs).all())

    async def _measure(self, batch: Sequence[RolloutRef]) -> list[np.ndarray]:
        while True:
            try:
                return await self._learner.ref_logprobs([ref.rollout for ref in batch])
            except RankLostError:
                await self._learner.until_rebuilt()
