"""`ratchet train-critic`: trains a critic from the journals of earlier runs, for a run to start from. Runs in the
driver.

The responses, their scores and their log-probabilities are in the journals, so nothing is generated and nothing scored.
With --sample the starting policy first writes such a journal (deploy/sample_journal.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.config.ppo import Config
from common.errors import UserError
from common.files import write_json
from deploy.critic_checks import check_data, check_plan
from deploy.journal_parts import Asked, check_parts, read_parts, warn_of_other_responses, write_parts
from deploy.pass_training import Ranks, train_in_passes
from deploy.plan.needs import Phases, critic_needs
from deploy.policy_files import PolicyFiles
from deploy.run.critic import critic_basis
from deploy.run.directory import RunDirectory, run_owner
from deploy.run.finished import finished_critic_training
from deploy.sample_journal import JournalSampling
from deploy.screen.console import complain
from deploy.screen.critic_progress import CriticProgress
from deploy.screen.sampling_progress import SamplingProgress
from deploy.session import session
from deploy.sinks.following import check_sinks
from learner.critic.evaluation import CriticEvaluation, best_of
from learner.critic.rollouts import JournalPart, Rollouts
from learner.critic.trainer import CriticTrainer
from learner.critic.training import CriticData, CriticRun, train_critic
from learner.ppo.critic_files import CriticBasis
from learner.ranks.group import CriticTrainerGroup


def run_critic_training(
    cfg: Config,
    directory: Path,
    *,
    sources: Sequence[Path] = (),
    steps: str | None = None,
    sample: int = 0,
    resume: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Trains in `directory`, writes the critic into RUN/critic, and returns the summary.

    `sources`: run directories whose journals are read. `steps`: the steps to read of each, such as 10:40. `sample`:
    number of responses of the starting policy to add. Everything a user can get wrong is checked first: a UserError
    leaves nothing written and nothing running.
    """
    with run_owner(directory, resume=resume, force=force) as owned:
        asked = Asked.read(directory) if resume else Asked(sources, steps, sample)
        if resume and (finished := finished_critic_training(cfg, directory)) is not None:
            return finished
        return _run_in(owned, cfg, asked, resume=resume, force=force)


def _run_in(owned: RunDirectory, cfg: Config, asked: Asked, *, resume: bool, force: bool) -> dict[str, Any]:
    started, directory = time.perf_counter(), owned.directory
    check_sinks(cfg.logging)
    if not cfg.ppo.has_critic:
        raise UserError(f'ppo.advantages ("{cfg.ppo.advantages}") needs no critic; train one for a config with "gae"')
    policy = PolicyFiles.load(cfg.model.path, trust_remote_code=cfg.model.trust_remote_code)
    progress = CriticProgress(directory, owned.log)
    training = _Training(owned, policy, critic_basis(cfg, policy), progress, resume=resume, force=force)
    train = training.on_samples if asked.responses else training.on_journals
    data, evaluations = train(cfg, asked)
    summary = summarise(data, evaluations, seconds=time.perf_counter() - started)
    write_json(directory / "summary.json", summary)
    progress.end(evaluations, seconds=summary["seconds"])
    return summary


@dataclass(frozen=True)
class _Training:
    """A training in the run directory, with or without sampling before it."""

    owned: RunDirectory
    policy: PolicyFiles
    basis: CriticBasis
    progress: CriticProgress
    _: KW_ONLY
    resume: bool
    force: bool

    def on_journals(self, cfg: Config, asked: Asked) -> tuple[CriticData, list[CriticEvaluation]]:
        """Trains on existing journals. Everything is checked first. The directory is this run's once the ranks have
        accepted the model."""
        directory = self.owned.directory
        data = self._load(cfg, read_parts(directory, cfg) if self.resume else asked.parts(directory))

        def phases(cfg: Config) -> Phases:
            return [critic_needs(cfg, self.policy.size, row=data.rollouts.longest)]

        def record() -> None:
            if not self.resume:
                write_parts(directory, cfg, data.rollouts)

        with self._session(cfg, phases, record) as (cfg, begin):
            return self._train(replace(data, cfg=cfg), begin)

    def on_samples(self, cfg: Config, asked: Asked) -> tuple[CriticData, list[CriticEvaluation]]:
        """Samples, then trains. The directory is this run's before the first response is sampled."""
        directory, policy = self.owned.directory, self.policy
        others = asked.parts_of_others(directory)
        check_parts(others, self.basis)
        sampling = JournalSampling.prepare(cfg, policy, directory, asked.responses, resume=self.resume)
        known = Rollouts(others)
        check_plan(cfg, directory, policy.size, sampling.num_prompts, asked.responses, known)

        def phases(cfg: Config) -> Phases:
            row = max(cfg.max_sequence_tokens, known.longest)
            return [sampling.needs(cfg), critic_needs(cfg, policy.size, row=row)]

        def record() -> None:
            asked.write(directory)
            sampling.record()

        with self._session(cfg, phases, record) as (cfg, begin):
            begin()
            policy.keep_tokenizer(directory)
            sampling.run(cfg, SamplingProgress(directory, self.owned.log))
            data = self._load(cfg, asked.parts(directory))
            write_parts(directory, cfg, data.rollouts)
            return self._train(data, lambda: None)

    def _load(self, cfg: Config, parts: Sequence[JournalPart]) -> CriticData:
        """Raises UserError if a critic cannot be trained on these parts."""
        check_parts(parts, self.basis)
        warn_of_other_responses(parts, self.basis)
        rollouts = Rollouts(parts, on_progress=partial(self.progress.work, "journals"))
        for fault in rollouts.faults:
            complain(f"warning: {fault}, so the step is skipped: nothing can be learned from it")
        data = CriticData.split(cfg, rollouts)
        check_data(data, self.owned.directory, self.policy.size)
        return data

    def _session(
        self, cfg: Config, phases: Callable[[Config], Phases], record: Callable[[], None]
    ) -> AbstractContextManager[tuple[Config, Callable[[], None]]]:
        trains, resume, force = self.policy.size, self.resume, self.force
        return session(
            cfg, "train-critic", self.owned, phases, trains=trains, resume=resume, force=force, record=record
        )

    def _train(self, data: CriticData, accepted: Callable[[], None]) -> tuple[CriticData, list[CriticEvaluation]]:
        """`accepted` is called when the ranks have accepted the model."""
        cfg, directory, progress = data.cfg, self.owned.directory, self.progress

        def begin() -> None:
            accepted()
            progress.begin(data)

        def train(group: Any, **callbacks: Any) -> Coroutine[Any, Any, list[CriticEvaluation]]:
            run = CriticRun(data, directory, group, self.basis, on_progress=progress.work, **callbacks)
            return train_critic(run)

        ranks = Ranks(CriticTrainerGroup, CriticTrainer, (data.num_steps, data.rollouts.moments, directory.resolve()))
        return data, train_in_passes(cfg, directory, ranks, train, progress, begin)


def summarise(data: CriticData, evaluations: Sequence[CriticEvaluation], *, seconds: float) -> dict[str, Any]:
    """The contents of RUN/summary.json. Figures are of the best pass, on the held-out prompts."""
    best = best_of(evaluations)
    return {
        "seed": data.cfg.seed,
        "training_rollouts": len(data.rows),
        "heldout_rollouts": len(data.heldout),
        "passes": len(evaluations) - 1,
        "best_pass": best.epoch,
        "r2": best.r2,
        "explained_variance": best.explained,
        "explained_variance_by_pass": {f"{one.epoch:g}": one.explained for one in evaluations},
        "heldout_loss": best.loss,
        **best.figures,
        "seconds": round(seconds, 1),
    }
