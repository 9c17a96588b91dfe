"""What the loop asks of the roles around it. The pool and the learner group fulfil it on Ray, fakes in the tests."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from common.types import Prompt, RolloutRef, Score, Void


class Generators(Protocol):
    async def generate(self, prompt: Prompt, *, plain_tokens: int = 0) -> RolloutRef:
        """With `plain_tokens` this many tokens of the whole distribution, with nothing cut off or forbidden and past
        any end token. Raises GivenUpError when replica after replica dies over this prompt."""

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        """What the references in RolloutRef or ExperienceRef stand for; a RolloutLostError in place of what is gone.
        What
        is no reference stands for itself."""

    async def load(self, weights: AsyncIterable[Any], version: int) -> dict[str, float]:
        """Returns when every routable replica has verified and holds `version`, with what it took: `weights/*`."""


class Reward(Protocol):
    async def score(self, written: RolloutRef) -> Score | Void:
        """Raises RolloutLostError if the rollout is gone."""

    async def judge(self, written: RolloutRef) -> Score | Void:
        """As `score`, with the components of the judges beside, which count nothing in the total."""


class Reference(Protocol):
    async def logprobs(self, written: RolloutRef) -> tuple[Any, bool]:
        """Float32 [R] nats or a reference to them, and whether all are finite. Raises RolloutLostError if the rollout
        is gone."""


class LearnerGroup(Protocol):
    @property
    def step(self) -> int:
        """Updates done; also the policy version that the next publication carries."""

    async def update(self, table: pa.Table) -> dict[str, float]: ...

    def publish(self) -> AsyncIterator[Any]:
        """Handles to the newest weights, bucket by bucket as they are packed, for `Generators.load`; tensors do not
        pass through the caller."""

    async def policy_logprobs(self, rollouts: Sequence[Any]) -> list[np.ndarray]:
        """Log-probabilities of each response under the newest weights, float32 [R], nats."""

    async def save(self, directory: Path) -> None: ...

    async def restore(self, directory: Path) -> None: ...

    async def save_policy(self, directory: Path) -> None: ...
