"""`ratchet train-critic`: journals of earlier runs become a critic that a run can start from. Runs in the driver.

The responses, their scores and their log-probabilities are in the journals, so nothing is generated and nothing scored.
With --sample the starting policy first writes such a journal (deploy/sample_journal.py).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from actors.pool.ray_actor import actor
from common.config.ppo import Config
from common.errors import UserError
from common.files import write_json
from common.memory import GIB
from deploy.ending import signals
from deploy.journal_parts import Asked, check_parts, read_parts, write_parts
from deploy.needs import Phases, critic_needs
from deploy.policy_files import PolicyFiles
from deploy.run.critic import critic_basis
from deploy.run.directory import RunDirectory, run_owner
from deploy.run.finished import finished_critic_training
from deploy.sample_journal import JournalSampling
from deploy.screen.critic_progress import CriticProgress
from deploy.screen.sampling_progress import SamplingProgress
from deploy.session import session, step_grace_s
from deploy.sinks.following import check_sinks, following
from learner.critic.evaluation import CriticEvaluation, best_of
from learner.critic.files import CriticBasis
from learner.critic.rollouts import JournalPart, Rollouts
from learner.critic.trainer import CriticTrainer
from learner.critic.training import CriticData, CriticRun, train_critic
from learner.ranks.group import CriticTrainerGroup

STATE_BYTES = 4  # of a number in a state of the trunk, at most


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

    `sources`: run directories whose journals are read, and `steps` of each, such as 10:40. `sample`: responses of the
    starting policy that are added to them. Everything a user can get wrong is checked first: a UserError leaves nothing
    written and nothing running.
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
    basis = critic_basis(cfg, policy)
    progress = CriticProgress(directory, owned.log)

    def load(parts: Sequence[JournalPart]) -> CriticData:
        """Raises UserError if a critic cannot be trained on these parts."""
        check_parts(parts, basis)
        data = CriticData.split(cfg, Rollouts(parts, on_progress=partial(progress.work, "journals")))
        _check(data, policy, directory)
        return data

    sampling: JournalSampling | None = None
    data: CriticData | None = None
    if asked.responses:
        check_parts(asked.parts_of_others(), basis)
        sampling = JournalSampling.prepare(cfg, policy, directory, asked.responses, resume=resume)
    else:
        data = load(read_parts(directory, cfg) if resume else asked.parts(directory))

    def phases(cfg: Config) -> Phases:
        return [*([sampling.needs(cfg)] if sampling is not None else []), critic_needs(cfg, policy.size)]

    def record() -> None:
        if sampling is not None:
            asked.write(directory)
            sampling.record()
        elif data is not None and not resume:
            write_parts(directory, cfg, data.rollouts)

    here = session(cfg, "train-critic", owned, phases, trains=policy.size, resume=resume, force=force, record=record)
    with here as (cfg, begin):
        if sampling is not None:
            begin()
            policy.keep_tokenizer(directory)
            sampling.run(cfg, SamplingProgress(directory, owned.log))
            data = load(asked.parts(directory))
            write_parts(directory, cfg, data.rollouts)
        assert data is not None  # without sampling it was loaded above
        data = CriticData(cfg, data.rollouts, data.rows, data.heldout)

        def accepted() -> None:
            """Called when the ranks have accepted the model: from now on the directory is this run's."""
            if sampling is None:
                begin()
            progress.begin(data)

        with following(cfg.logging, directory, cfg, tell=progress.note, report=progress.warn) as wake_sinks:
            training = _train(data, directory, basis, accepted, progress, wake_sinks)
            evaluations = signals.run(training, grace_s=step_grace_s(cfg))
    summary = summarise(data, evaluations, seconds=time.perf_counter() - started)
    write_json(directory / "summary.json", summary)
    progress.end(evaluations, seconds=summary["seconds"])
    return summary


def _check(data: CriticData, policy: PolicyFiles, directory: Path) -> None:
    """Raises UserError if this training could not succeed."""
    data.check_returns()
    warmup = data.cfg.optimizer.warmup_steps
    if warmup >= data.num_steps:
        raise UserError(
            f"optimizer.warmup_steps ({warmup}) must be below the {data.num_steps} steps of critic_training.passes "
            f"passes over {len(data.rows)} rollouts; lower the first, or raise the passes"
        )
    if data.cfg.learner.critic == "shared":
        size = int(data.rollouts.response_tokens.sum()) * policy.size.hidden * STATE_BYTES
        existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if size > (free := shutil.disk_usage(existing).free):
            raise UserError(
                f"the states of the shared trunk may take {size / GIB:.1f} GiB, and {existing} has "
                f"{free / GIB:.1f} GiB free; choose another --run, or fewer --steps"
            )


async def _train(
    data: CriticData,
    directory: Path,
    basis: CriticBasis,
    accepted: Callable[[], None],
    progress: CriticProgress,
    wake_sinks: Callable[[], None],
) -> list[CriticEvaluation]:
    """Starts the trainer's ranks, calls `accepted`, trains, and stops the ranks."""
    cfg, moments, run = data.cfg, data.rollouts.moments, directory.resolve()
    group = CriticTrainerGroup(
        lambda rank: actor(CriticTrainer, cfg.learner, f"CriticTrainer({rank})").remote(
            cfg, data.num_steps, moments, run
        ),
        cfg.learner,
        startup_timeout_s=cfg.ray.startup_timeout_s,
        report=progress.warn,
    )

    def stepped(record: dict[str, Any]) -> None:
        progress.step(record)
        wake_sinks()

    def evaluated(evaluation: CriticEvaluation) -> None:
        progress.evaluation(evaluation)
        wake_sinks()

    try:
        await group.start()
        accepted()
        return await train_critic(
            CriticRun(
                data,
                directory,
                group,
                basis,
                on_progress=progress.work,
                on_step=stepped,
                on_evaluation=evaluated,
                report=progress.warn,
            )
        )
    finally:
        group.stop()


def summarise(data: CriticData, evaluations: Sequence[CriticEvaluation], *, seconds: float) -> dict[str, Any]:
    """The contents of RUN/summary.json. Figures are of the best pass, on the held-out prompts."""
    best = best_of(evaluations)
    return {
        "seed": data.cfg.seed,
        "training_rollouts": len(data.rows),
        "heldout_rollouts": len(data.heldout),
        "passes": len(evaluations) - 1,
        "best_pass": best.epoch,
        "explained_variance": best.explained,
        "explained_variance_by_pass": {f"{one.epoch:g}": one.explained for one in evaluations},
        "heldout_loss": best.loss,
        **best.figures,
        "seconds": round(seconds, 1),
    }
