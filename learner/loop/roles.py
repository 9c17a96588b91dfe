"""The roles as the loop calls them: one protocol for each. Runs in the driver.

`actors.pool.roles` and `learner.ranks.group` implement these protocols on Ray; the tests use fakes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from common.config.ppo import Config
from common.types import Prompt, RolloutRef, Score, Void

T = TypeVar("T")


class Generators(Protocol):
    async def generate(self, prompt: Prompt, *, plain_tokens: int = 0) -> RolloutRef:
        """One response to the prompt. With `plain_tokens`: this many tokens sampled from the whole distribution, past
        any end token. Raises GivenUpError when several replicas die while they run this prompt."""

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        """The values behind the references of a RolloutRef or ExperienceRef. A value that is gone becomes a
        RolloutLostError in its place; an item that is not a reference is returned unchanged."""

    async def sleep(self) -> None:
        """Every replica lends its GPU memory to the learner until `wake`. Requests wait meanwhile."""

    async def wake(self) -> None:
        """Every replica takes its memory back and continues. A replica that is awake does nothing."""

    async def load(self, weights: AsyncGenerator[Any, None], version: int) -> dict[str, float]:
        """Brings a publication of `LearnerGroup.publish` to every replica. Returns the metrics `weights/*` when every
        replica that gets prompts has verified and holds `version`.

        It keeps the references to the full buckets until the next version is loaded, for replicas that join later, and
        drops each reference to a delta as soon as all replicas have staged it.
        """


class Reward(Protocol):
    async def score(self, ref: RolloutRef) -> Score | Void:
        """Raises RolloutLostError if the rollout is gone."""

    async def judge(self, ref: RolloutRef) -> Score | Void:
        """Like `score`, with the scores of evaluation.judges too. These are not in the total, and may be missing."""


class Reference(Protocol):
    async def logprobs(self, ref: RolloutRef) -> tuple[Any, bool]:
        """Log-probabilities of the response, float32 [R] nats or a reference to them, and whether all are finite.
        Raises RolloutLostError if the rollout is gone."""


class LearnerGroup(Protocol):
    @property
    def step(self) -> int:
        """Updates done; also the policy version of the next publication."""

    async def update(self, table: pa.Table) -> dict[str, float]:
        """One PPO step on a batch of experience. Returns its metrics. Raises BatchError if numbers of the batch, or
        numbers computed from them, are not finite: some weights may have changed, so all must be restored."""

    async def credit(self) -> pa.Table:
        """The numbers that the newest update derived for each token: a table of `DERIVED_SCHEMA`. At most once for each
        update."""

    async def skip(self) -> None:
        """Counts a step in which nothing is learned: nothing but `step` changes."""

    async def reconfigure(self, cfg: Config) -> None:
        """Uses these settings from the next step on."""

    async def rebuild(self) -> None:
        """Ends all ranks and starts new ones, with the initial weights: `step` is 0 then. Every call may raise
        RankLostError; after it, only this one can succeed."""

    async def unless_lost(self, work: Awaitable[T]) -> T:
        """The result of `work`. If a rank is lost first, cancels `work` and raises RankLostError."""

    def publish(self) -> AsyncGenerator[Any, None]:
        """The newest weights, for `Generators.load`: a PublishedBucket each time one more bucket is packed, and last
        the Manifest. Raises an error that names the rank when one fails.

        The driver owns every published object: they outlive the rank that packed them, and the object store frees each
        when no reference is left. No tensor passes through the driver. A learner that publishes deltas keeps references
        to the newest complete set as their base.
        """

    async def policy_logprobs(self, rollouts: Sequence[Any]) -> list[np.ndarray]:
        """Log-probabilities of each response under the newest weights, float32 [R], nats."""

    async def save(self, directory: Path) -> Mapping[str, str]:
        """Writes the files of a checkpoint into the directory, all but its marker, and syncs them to disk. Returns the
        SHA-256 of each, by name."""

    async def restore(self, directory: Path) -> None:
        """Continues from a checkpoint. Any number of ranks may have written it."""

    async def save_policy(self, directory: Path) -> None:
        """Writes the policy as a Hugging Face directory."""
