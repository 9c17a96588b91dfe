"""`ratchet train-critic --sample N`: the starting policy answers training prompts, and a journal gets its answers.

Runs in the driver. The policy never learns, so no learner and no reference runs. `JournalSampling.prepare` checks
everything a user can get wrong. `session` calls `needs` and `record`. `run` starts the engines, and stops them before
it returns, because the trainer needs their memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from actors.pool.roles import RewardPool
from common.config.ppo import Config
from common.data.prompt_records import PromptRecord
from common.errors import UserError
from deploy.ending import signals
from deploy.ending.ray_errors import errors_shown_first
from deploy.plan.needs import Need, ScoringModel, service_needs
from deploy.plan.object_store import sampling_store
from deploy.policy_files import PolicyFiles
from deploy.run.error_files import ErrorFiles
from deploy.run.identity import identity_of
from deploy.run.start import Start, new_start, resumed_start
from deploy.screen.sampling_progress import SamplingProgress
from deploy.session import load_inputs, rare_full_collections
from deploy.starting import Starter
from learner.loop.journal import Journal
from learner.loop.notes import learns
from learner.loop.prompts import PromptStream
from learner.loop.sampling import Sampling, num_responses, sample


@dataclass(frozen=True)
class JournalSampling:
    """The journal of the starting policy in the run directory, which may not have begun yet."""

    directory: Path
    policy: PolicyFiles
    records: Sequence[PromptRecord]
    reward_models: Sequence[ScoringModel]
    start: Start
    responses: int  # in the journal, at the end

    @classmethod
    def prepare(
        cls, cfg: Config, policy: PolicyFiles, directory: Path, responses: int, *, resume: bool = False
    ) -> JournalSampling:
        """Checks prompts, reward sources, and a journal that is continued. Writes nothing. Raises UserError."""
        inputs = load_inputs(cfg, policy, cfg.reward, {"prompts.train": cfg.prompts.train})
        [records] = inputs.records
        prompts = _stream(cfg, records)
        identity = identity_of(cfg, policy, records, ())
        if resume:
            start = resumed_start(directory, cfg, identity, prompts, learns=False)
            _check_never_learned(Journal(directory / "journal"))
        else:
            start = new_start(directory, cfg, identity, prompts, learns=False)
        return cls(directory, policy, records, inputs.reward_models, start, responses)

    def needs(self, cfg: Config) -> list[Need]:
        """The processes that sample."""
        services = service_needs(cfg, self.policy.size, self.reward_models)
        stores = {"generators": sampling_store(cfg)}
        return [replace(need, store=stores.get(need.section, {})) for need in services if need.section != "reference"]

    @property
    def num_prompts(self) -> int:
        """Training prompts."""
        return len(self.records)

    def record(self) -> None:
        """Begins the journal, unless it has begun. Called by `session`."""
        self.start.record()

    @property
    def missing(self) -> int:
        """Responses that the journal still lacks."""
        return max(0, self.responses - num_responses(Journal(self.directory / "journal")))

    def run(self, cfg: Config, progress: SamplingProgress) -> None:
        """Samples the missing responses, and stops all engines. Does nothing if none is missing."""
        if self.missing:
            with rare_full_collections():
                signals.run(self._run(cfg, progress))

    async def _run(self, cfg: Config, progress: SamplingProgress) -> None:
        began = time.perf_counter()
        journal = Journal(self.directory / "journal")
        progress.begin(num_responses(journal), self.responses, prompts=len(self.records))
        start = Starter(cfg.ray, on_event=progress.pool, tell=progress.note)
        with ExitStack() as ending:
            ending.callback(start.stop)
            ending.enter_context(errors_shown_first())
            errors = ErrorFiles(self.directory)
            generators, rewards = await asyncio.gather(
                start.writers(self.policy, cfg, keep=errors.keep, seed=_generator_seed(cfg)),
                start.rewards(cfg.reward, policy=self.policy),
            )
            progress.ready()
            reward = RewardPool(rewards, errors.keep)
            prompts = _stream(cfg, self.records)
            run = Sampling(cfg, self.directory, prompts, generators, reward, self.policy.decode, progress.batch)
            ending.callback(asyncio.create_task(progress.follow(lambda: run.finished())).cancel)
            await sample(run, self.responses)
        progress.end(seconds=time.perf_counter() - began)


def _generator_seed(cfg: Config) -> int:
    """The seed of the sampled tokens. With the run's own seed, a later run would write the same responses in its first
    step: the critic would already have seen them, and their scores would count twice in the moments."""
    return int.from_bytes(hashlib.blake2b(f"critic/{cfg.seed}".encode(), digest_size=8).digest())


def _stream(cfg: Config, records: Sequence[PromptRecord]) -> PromptStream:
    return PromptStream(records, seed=cfg.seed, rollouts_per_prompt=cfg.prompts.rollouts_per_prompt)


def _check_never_learned(journal: Journal) -> None:
    if journal.notes and learns(journal.notes):
        raise UserError(
            f"{journal.directory} is the journal of a run that learns; only a journal that ratchet train-critic "
            "--sample has begun can get more responses of the starting policy"
        )
