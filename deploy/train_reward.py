"""`ratchet train-reward`: trains a reward model from preference pairs, and measures the scale of its scores. Runs in
the driver."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from actors.pool.roles import RewardPool
from common.config.actors import SourcesConfig
from common.config.reward_model import RewardTrainingConfig
from common.config.sources import ModelSourceConfig
from common.errors import UserError
from common.files import write_json
from common.model.reward_head import ScoreScale, check_reward_files, read_scale, write_scale
from common.types import Prompt, Score
from deploy.ending import signals
from deploy.pass_training import Ranks, train_in_passes
from deploy.plan.needs import Phases, generator_needs, reward_needs, trainer_needs
from deploy.policy_files import PolicyFiles
from deploy.reward_inputs import check_pairs, load_pairs, longest_answered, prepared_pairs, reference_prompts
from deploy.run.directory import RunDirectory, run_owner
from deploy.run.finished import finished_reward_training
from deploy.screen.reward_progress import RewardProgress, plot_calibration
from deploy.session import session
from deploy.sinks.following import check_sinks
from deploy.starting import Starter
from learner.loop.answers import answer
from learner.ranks.group import RewardTrainerGroup
from learner.reward_model.calibration import PreferenceEvaluation
from learner.reward_model.trainer import RewardTrainer
from learner.reward_model.training import RewardRun, steps_per_epoch, train_reward_model

SOURCE = "reward"  # the model's name in the reward service that scores the reference policy's responses


def run_reward_training(
    cfg: RewardTrainingConfig, directory: Path, *, resume: bool = False, force: bool = False
) -> dict[str, Any]:
    """Trains in `directory`, writes the model into RUN/model, and returns the summary.

    Everything a user can get wrong is checked first, every record included: a UserError leaves nothing written and
    nothing running.
    """
    with run_owner(directory, resume=resume, force=force) as owned:
        if resume and (finished := finished_reward_training(cfg, directory)) is not None:
            return finished
        return _run_in(owned, cfg, resume=resume, force=force)


def _run_in(owned: RunDirectory, cfg: RewardTrainingConfig, *, resume: bool, force: bool) -> dict[str, Any]:
    started, directory = time.perf_counter(), owned.directory
    check_sinks(cfg.logging)
    base, reference = load_models(cfg)
    if resume and not (directory / "pairs/counts.json").exists():
        raise UserError(f"{directory} was stopped before its pairs were written; begin again with --force")
    progress = RewardProgress(cfg, directory, owned.log)
    with prepared_pairs(cfg, base, directory, resume=resume) as pairs:
        train, heldout = load_pairs(cfg, pairs)
        counts = json.loads((pairs / "counts.json").read_text(encoding="utf-8"))
        check_pairs(cfg, base, train, heldout, counts)
        prompts = reference_prompts(cfg, reference, train) if cfg.scale.responses else []

        def phases(cfg: RewardTrainingConfig) -> Phases:
            training = trainer_needs(cfg.learner, base.size, row=2 * cfg.data.max_tokens)
            if not prompts:
                return [training]
            scores = _service(cfg, directory)
            models = [(source, base.size) for source in scores.sources if isinstance(source, ModelSourceConfig)]
            service = reward_needs("learner", scores, models)
            longest = longest_answered(cfg, reference)
            return [
                training,
                [*generator_needs(cfg.generators, reference.size, max_tokens=longest, updated=False), *service],
            ]

        here = session(cfg, "train-reward", owned, phases, trains=base.size, resume=resume, force=force)
        with here as (cfg, begin):

            def accepted() -> None:
                """Called when the ranks have accepted the model: from now on the directory is this run's."""
                begin()
                if not resume:
                    shutil.move(pairs, directory / "pairs")  # `train` and `heldout` stay readable: memory-mapped
                progress.begin(counts, len(train), len(heldout))

            def training(group: Any, **callbacks: Any) -> Coroutine[Any, Any, list[PreferenceEvaluation]]:
                return train_reward_model(RewardRun(cfg, directory, train, heldout, group, **callbacks))

            num_steps = cfg.epochs * steps_per_epoch(len(train), cfg)
            ranks = Ranks(RewardTrainerGroup, RewardTrainer, (num_steps,))
            evaluations = train_in_passes(cfg, directory, ranks, training, progress, accepted)
            if prompts:  # after the ranks have ended, because the services that measure the scale need their memory
                signals.run(_measure_scale(cfg, directory, reference, prompts, progress))
    if evaluations:
        plot_calibration(evaluations[-1], directory / "calibration.png")
    scale = read_scale(directory / "model") if prompts else None
    summary = summarise(cfg, counts, evaluations, scale, len(train), seconds=time.perf_counter() - started)
    write_json(directory / "summary.json", summary)
    progress.end(evaluations, scale, seconds=summary["seconds"])
    return summary


def load_models(cfg: RewardTrainingConfig) -> tuple[PolicyFiles, PolicyFiles]:
    """The model to train, and the reference policy whose responses set the scale."""
    trust = cfg.model.trust_remote_code
    base = reference = PolicyFiles.load(cfg.model.path, trust_remote_code=trust, packed=False)
    if cfg.scale.policy:
        reference = PolicyFiles.load(cfg.scale.policy, "scale.policy", trust_remote_code=trust, packed=False)
    check_reward_files(base.directory)
    return base, reference


async def _measure_scale(
    cfg: RewardTrainingConfig, directory: Path, reference: PolicyFiles, prompts: list[Prompt], progress: RewardProgress
) -> None:
    """The reference policy answers the prompts, and the reward service scores the answers. Writes the mean and the
    standard deviation of the scores into the model's directory."""
    write_scale(directory / "model", ScoreScale(chat=cfg.data.format == "chat"))
    start, service = Starter(cfg.ray, on_event=progress.pool, tell=progress.note), _service(cfg, directory)
    longest = cfg.data.max_tokens + cfg.sampling.max_new_tokens
    generators, rewards = await asyncio.gather(
        start.generators(reference, cfg.generators, cfg.sampling, seed=cfg.seed, max_tokens=longest),
        start.rewards(service, policy=reference),
    )
    score = RewardPool(rewards).score

    scored = 0

    async def one(prompt: Prompt) -> float:
        nonlocal scored
        _, result, _ = await answer(prompt, generators, score)
        scored += 1
        progress.scale(scored, len(prompts))
        if not isinstance(result, Score):
            raise RuntimeError(f"the trained reward model gave no score: {result.reason}")
        return result.components[SOURCE]

    scores = np.array(await asyncio.gather(*(one(prompt) for prompt in prompts)))
    if scores.std() == 0:
        raise RuntimeError("the trained reward model gives every response of the reference policy the same score")
    scale = ScoreScale(cfg.data.format == "chat", float(scores.mean()), float(scores.std()))
    write_scale(directory / "model", scale)
    start.stop()


def _service(cfg: RewardTrainingConfig, directory: Path) -> SourcesConfig:
    """The trained model as a reward service, with the trainer's threads and GPUs."""
    longest = cfg.data.max_tokens + cfg.sampling.max_new_tokens
    model = ModelSourceConfig(
        name=SOURCE,
        model=str((directory / "model").resolve()),
        max_tokens=longest,
        max_batch_tokens=max(longest, 2048),
    )
    return SourcesConfig(sources=(model,), threads=cfg.learner.threads, gpus=cfg.learner.gpus)


def summarise(
    cfg: RewardTrainingConfig,
    counts: Mapping[str, Any],
    evaluations: list[PreferenceEvaluation],
    scale: ScoreScale | None,
    pairs: int,
    *,
    seconds: float,
) -> dict[str, Any]:
    """The contents of RUN/summary.json."""
    summary = {"seed": cfg.seed, "epochs": cfg.epochs, "training_pairs": pairs, "data": counts}
    if evaluations:
        last = evaluations[-1]
        summary |= {
            "heldout_pairs": last.pairs,
            "accuracy": last.accuracy,
            "accuracy_interval": last.interval,
            "heldout_loss": last.loss,
            "calibration_error": last.calibration_error,
            "accuracy_by_epoch": {f"{e.epoch:g}": e.accuracy for e in evaluations},
        }
    if scale is not None:
        summary |= {
            "reference_responses": cfg.scale.responses,
            "reference_score_mean": scale.mean,
            "reference_score_std": scale.deviation,
        }
    return summary | {"seconds": round(seconds, 1)}
