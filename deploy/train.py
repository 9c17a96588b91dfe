"""`ratchet train`: which processes exist and how they are connected. Runs in the driver.

The README lists the files to read after this one, in order: learner/loop/train_loop.py, learner/loop/roles.py,
common/types.py and so on. They follow one prompt through the system.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.pool.ray_actor import actor
from actors.pool.replica import PoolEvent
from actors.pool.roles import ReferencePool, RewardPool
from common.config.ppo import Config
from common.files import append_record, write_json
from common.health.health import Event
from common.types import Experience, Prompt, Void
from deploy.cluster.connection import dashboard, metrics_addresses
from deploy.ending import signals
from deploy.ending.ray_errors import errors_shown_first
from deploy.monitoring.endpoint import RunFigures
from deploy.plan.needs import Phases, needs
from deploy.policy_files import PolicyFiles
from deploy.run.directory import RunDirectory, run_owner
from deploy.run.error_files import ErrorFiles
from deploy.run.finished import finished_training
from deploy.run.start import planned_start
from deploy.run.summary import answers_path, summarise, write_answers
from deploy.scale import follow_targets
from deploy.screen.progress import Progress
from deploy.session import load_inputs, rare_full_collections, session, step_grace_s
from deploy.sinks.following import check_sinks, following
from deploy.starting import Starter
from learner.loop.answers import Answer
from learner.loop.evaluation import Evaluation
from learner.loop.journal import Journal
from learner.loop.prompts import PromptStream, heldout_prompts
from learner.loop.roles import Reference
from learner.loop.run import Run
from learner.loop.train_loop import train
from learner.ppo.learner import Learner
from learner.ranks.adapter_reference import AdapterReference
from learner.ranks.group import LearnerGroup


def run_training(
    cfg: Config,
    directory: Path,
    *,
    resume: bool = False,
    force: bool = False,
    changed: Sequence[str] = (),
    accepted: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains in `directory` and returns its summary. With `resume`, the settings `changed` and the inputs `accepted`
    may differ from before, and the journal records them.

    Everything a user can get wrong is checked first: a UserError leaves nothing written and nothing running.
    """
    with run_owner(directory, resume=resume, force=force) as owned:
        if resume and (finished := finished_training(cfg, directory)) is not None:
            return finished
        return _run_in(owned, cfg, resume=resume, force=force, changed=changed, accepted=accepted)


def _run_in(
    owned: RunDirectory, cfg: Config, *, resume: bool, force: bool, changed: Sequence[str], accepted: Sequence[str]
) -> dict[str, Any]:
    started, directory = time.perf_counter(), owned.directory
    check_sinks(cfg.logging)
    policy = PolicyFiles.load(cfg.model.path, trust_remote_code=cfg.model.trust_remote_code)
    heldout_source = cfg.prompts.heldout if cfg.evaluation.prompts else None
    sources = {"prompts.train": cfg.prompts.train, "prompts.heldout": heldout_source}
    inputs = load_inputs(cfg, policy, cfg.reward, sources, judges=cfg.evaluation.judges)
    train_records, heldout_records = inputs.records
    prompts = PromptStream(train_records, seed=cfg.seed, rollouts_per_prompt=cfg.prompts.rollouts_per_prompt)
    heldout = heldout_prompts(heldout_records, cfg.evaluation.prompts)
    start = planned_start(
        directory, cfg, policy, inputs.records, prompts, resume=resume, changed=changed, accepted=accepted
    )
    cfg = start.cfg

    def phases(cfg: Config) -> Phases:
        return [needs(cfg, policy.size, inputs.reward_models)]

    here = session(cfg, "train", owned, phases, trains=policy.size, resume=resume, force=force, record=start.record)
    with RunFigures.served(cfg.monitoring) as figures, here as (cfg, begin):
        begin()
        policy.keep_tokenizer(directory)
        progress = Progress(cfg, directory, policy.tokenizer, owned.log)
        progress.begin(num_prompts=len(train_records), num_heldout=len(heldout))
        with (
            figures.discoverable(directory, metrics_addresses()),
            following(cfg.logging, directory, cfg, tell=progress.note, report=progress.warn) as wake_sinks,
            rare_full_collections(),
        ):
            training = _train(cfg, directory, policy, prompts, heldout, progress, figures, wake_sinks)
            evaluations = signals.run(training, grace_s=step_grace_s(cfg))
    summary = summarise(cfg, directory, evaluations, seconds=time.perf_counter() - started)
    write_json(directory / "summary.json", summary)
    progress.end(evaluations, wins=summary.get("win_rate"), seconds=summary["seconds"])
    return summary


async def _train(
    cfg: Config,
    directory: Path,
    policy: PolicyFiles,
    prompts: PromptStream,
    heldout: Sequence[Prompt],
    progress: Progress,
    figures: RunFigures,
    wake_sinks: Callable[[], None],
) -> list[Evaluation]:
    """Starts every role, connects them in a Run, and trains."""

    def pool_changed(event: PoolEvent) -> None:
        append_record(directory / "pool-events.jsonl", {"time": time.time(), **asdict(event)})
        progress.pool(event)

    start = Starter(cfg.ray, on_event=pool_changed, tell=progress.note)
    critic_digest = Journal(directory / "journal").identity.get("critic")
    learner = LearnerGroup(
        lambda rank: actor(Learner, cfg.learner, f"Learner({rank})").remote(cfg, critic_digest=critic_digest),
        cfg.learner,
        report=progress.warn,
        **start.for_ranks(),
        deltas=cfg.generators.updates == "changes",
    )

    async def start_reference() -> Reference:
        return AdapterReference(learner) if cfg.learner.lora is not None else ReferencePool(await start.references(cfg))

    def stepped(record: dict[str, Any], example: Experience, voids: list[Void], events: list[Event]) -> None:
        figures.step(record, events)
        progress.step(record, example, voids, events)
        wake_sinks()

    def evaluated(evaluation: Evaluation, answers: list[Answer], events: list[Event]) -> None:
        write_answers(answers_path(directory, evaluation), answers, policy.tokenizer)
        figures.evaluation(evaluation, events)
        progress.evaluation(evaluation, events)
        wake_sinks()

    with ExitStack() as ending:
        ending.callback(learner.stop)
        ending.callback(start.stop)
        ending.enter_context(errors_shown_first())
        errors = ErrorFiles(directory)
        generators, rewards, reference, _ = await asyncio.gather(
            start.writers(policy, cfg, keep=errors.keep, seed=cfg.seed, sleeps=cfg.lent_share > 0),
            start.rewards(cfg.reward, policy=policy, judges=cfg.evaluation.judges),
            start_reference(),
            learner.start(),
        )
        progress.ready(start.pools, dashboard=dashboard(), figures=figures.address)
        run = Run(
            cfg=cfg,
            directory=directory,
            prompts=prompts,
            heldout=heldout,
            generators=generators,
            reward=RewardPool(rewards, errors.keep),
            reference=reference,
            learner=learner,
            model_type=policy.model_type,
            decode=policy.decode,
            on_step=stepped,
            on_answer=progress.answered,
            on_evaluation=evaluated,
            report=progress.warn,
        )
        for background in (follow_targets(directory, start.pools), progress.while_silent(lambda: run.doing())):
            ending.callback(asyncio.create_task(background).cancel)
        return await train(run)
