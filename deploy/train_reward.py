"""`ratchet train-reward`: preference pairs to a reward model, and to the scale that its scores are reported on."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from actors.pool import GeneratorPool, RewardPool, actor
from actors.reward_functions import Reward
from common.config import ModelSourceConfig, PromptFormat, RewardTrainingConfig, SourcesConfig, UserError
from common.preferences import PairCounts, Pairs, split, tokenise_pairs, without_prompts_of
from common.prompts import PromptRecord, heldout_prompts, prompt_record
from common.reward_models import ScoreScale, read_scale, scored_padding_id, write_scale
from common.types import Prompt, Score
from deploy.cluster import cluster
from deploy.placement import check_kv_cache, generator_needs, place, reward_needs, trainer_needs
from deploy.reward_progress import RewardProgress, plot_calibration
from deploy.roles import PolicyFiles, Starter
from deploy.run_directory import clear, refuse_overwriting, sole_owner, write_config
from learner.calibration import PreferenceEvaluation
from learner.group import RewardTrainerGroup
from learner.reward_training import RewardRun, RewardTrainer, steps_per_epoch, train_reward_model

SOURCE = "reward"  # the model's name among the sources of the service that scores the reference policy's responses


def run_reward_training(
    cfg: RewardTrainingConfig, directory: Path, *, resume: bool = False, force: bool = False
) -> dict[str, Any]:
    """Trains in `directory`, leaves the model in RUN/model, and returns the summary.

    Everything a user can get wrong is checked first, every record included: a UserError leaves nothing written and
    nothing running.
    """
    started = time.perf_counter()
    base, reference = (
        PolicyFiles.load(cfg.model.path),
        PolicyFiles.load(cfg.scale.policy or cfg.model.path, "scale.policy"),
    )
    if not resume:
        refuse_overwriting(directory, force=force)
    beside = next(parent for parent in directory.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=beside, prefix=".ratchet-") as staging:
        pairs = directory / "pairs" if resume else Path(staging) / "pairs"
        if not resume:
            prepare_pairs(cfg, base, pairs)
        elif not (pairs / "counts.json").exists():
            raise UserError(f"{directory} was stopped before it held its pairs; begin again with --force")
        train, heldout = load_pairs(cfg, pairs)
        prompts = check_inputs(cfg, base, reference, train)
        with cluster(cfg.ray) as nodes:
            place(trainer_needs(cfg.learner, base.size, row=2 * cfg.data.max_tokens), nodes)
            if prompts:
                place(
                    [
                        *generator_needs(cfg.generators, reference.size),
                        *reward_needs("reward", _service(cfg, directory), [base.size]),
                    ],
                    nodes,
                )
            with sole_owner(directory):
                if not resume:
                    clear(directory)
                write_config(directory, cfg)
                if not resume:
                    shutil.move(pairs, directory / "pairs")
                    train, heldout = load_pairs(cfg, directory / "pairs")
                progress = RewardProgress(cfg, directory)
                progress.begin(read_counts(directory / "pairs"), len(train), len(heldout))
                evaluations = asyncio.run(_train(cfg, directory, train, heldout, progress))
                if prompts:
                    asyncio.run(_measure(cfg, directory, reference, prompts, progress))
    if evaluations:
        plot_calibration(evaluations[-1], directory / "calibration.png")
    summary = summarise(cfg, directory, evaluations, len(train), seconds=time.perf_counter() - started)
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    progress.end(evaluations, read_scale(directory / "model"), seconds=summary["seconds"])
    return summary


def prepare_pairs(cfg: RewardTrainingConfig, base: PolicyFiles, target: Path) -> None:
    """Every record read, checked and tokenised into `target`: train.arrow, heldout.arrow, counts.json."""
    target.mkdir()
    sources = {"train": cfg.data.train, "heldout": cfg.data.heldout}
    pad_id = scored_padding_id(base.directory)
    counts = {
        name: tokenise_pairs(source, cfg.data, base.tokenizer, target / f"{name}.arrow", pad_id=pad_id).record()
        for name, source in sources.items()
        if source is not None
    }
    (target / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


def read_counts(directory: Path) -> dict[str, PairCounts]:
    counts = json.loads((directory / "counts.json").read_text(encoding="utf-8"))
    return {name: PairCounts(**record) for name, record in counts.items()}


def load_pairs(cfg: RewardTrainingConfig, directory: Path) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs, no prompt in both."""
    pairs = Pairs(directory / "train.arrow")
    if cfg.data.heldout is not None:
        return pairs, without_prompts_of(Pairs(directory / "heldout.arrow"), pairs)
    return split(pairs, cfg.data.heldout_pairs, seed=cfg.seed)


def check_inputs(cfg: RewardTrainingConfig, base: PolicyFiles, reference: PolicyFiles, train: Pairs) -> list[Prompt]:
    """What the reference policy will be asked; none if the config wants none. Raises UserError."""
    if not train:
        raise UserError(f"data.train ({cfg.data.train}) leaves no pair to train on; give more, or hold out fewer")
    if (steps := cfg.epochs * steps_per_epoch(len(train), cfg)) <= cfg.optimizer.warmup_steps:
        raise UserError(
            f"optimizer.warmup_steps ({cfg.optimizer.warmup_steps}) must be below the {steps} steps that {len(train)} "
            f"pairs make; lower it, or lower pairs_per_step ({cfg.pairs_per_step})"
        )
    if cfg.data.max_tokens > base.size.context:
        raise UserError(
            f"data.max_tokens ({cfg.data.max_tokens}) exceeds the model's context of {base.size.context}; lower it"
        )
    if cfg.scale.responses == 0:
        return []
    room = reference.prompt_room(cfg.data.max_tokens, cfg.sampling)
    check_kv_cache(cfg.generators, reference.size, max_tokens=room + cfg.sampling.max_new_tokens)
    form = PromptFormat(format=cfg.data.format, max_tokens=room)
    records: dict[str, PromptRecord] = {}
    order = np.random.default_rng([cfg.seed, 2]).permutation(len(train))
    for index in order:
        if len(records) == cfg.scale.responses:
            break
        if prompt := train.prompt(int(index)):
            record = prompt_record(f"the prompt of pair {index}", {"prompt": prompt}, form, reference.tokenizer)
            if len(record.token_ids) <= room:
                records[record.text] = record
    if len(records) < 2:
        raise UserError(
            "scale.responses wants responses to the prompts of the pairs, but these have none that fit; give the "
            "records a `prompt`, or set scale.responses = 0"
        )
    return heldout_prompts(list(records.values()), len(records))


async def _train(
    cfg: RewardTrainingConfig, directory: Path, train: Pairs, heldout: Pairs, progress: RewardProgress
) -> list[PreferenceEvaluation]:
    num_steps = cfg.epochs * steps_per_epoch(len(train), cfg)
    ranks = [actor(RewardTrainer, cfg.learner).remote(cfg, num_steps) for _ in range(cfg.learner.ranks)]
    group = RewardTrainerGroup(ranks, timeout_s=cfg.learner.timeout_s)
    await group.start(cfg.ray.startup_timeout_s)
    progress.ready()
    try:
        return await train_reward_model(
            RewardRun(cfg, directory, train, heldout, group, progress.step, progress.evaluation)
        )
    finally:
        group.stop()  # its memory is needed for what follows


async def _measure(
    cfg: RewardTrainingConfig, directory: Path, reference: PolicyFiles, prompts: list[Prompt], progress: RewardProgress
) -> None:
    """Has the reference policy answer the prompts, scores that through the service, and stores mean and deviation."""
    write_scale(directory / "model", ScoreScale(chat=cfg.data.format == "chat"))
    start, service = Starter(cfg.ray, on_loss=progress.lost), _service(cfg, directory)
    longest = cfg.data.max_tokens + cfg.sampling.max_new_tokens
    generators, rewards = await asyncio.gather(
        start.generators(reference, cfg.generators, cfg.sampling, seed=cfg.seed, max_tokens=longest),
        start.pool(Reward, service, service, model=reference.path),
    )
    generate, score = GeneratorPool(generators).generate, RewardPool(rewards).score

    async def one(prompt: Prompt) -> float:
        result = await score(await generate(prompt))
        if not isinstance(result, Score):
            raise RuntimeError(f"the trained reward model gave no score: {result.reason}")
        return result.components[SOURCE]

    scores = np.array(await asyncio.gather(*(one(prompt) for prompt in prompts)))
    if scores.std() == 0:
        raise RuntimeError("the trained reward model gives every response of the reference policy the same score")
    scale = ScoreScale(cfg.data.format == "chat", float(scores.mean()), float(scores.std()))
    write_scale(directory / "model", scale)
    generators.stop()
    rewards.stop()


def _service(cfg: RewardTrainingConfig, directory: Path) -> SourcesConfig:
    """The trained model as a reward service, placed as the trainer was."""
    longest = cfg.data.max_tokens + cfg.sampling.max_new_tokens
    model = ModelSourceConfig(
        name=SOURCE,
        model=str((directory / "model").resolve()),
        max_tokens=longest,
        max_batch_tokens=max(longest, cfg.learner.micro_batch_tokens),
    )
    return SourcesConfig(sources=(model,), threads=cfg.learner.threads, gpus=cfg.learner.gpus)


def summarise(
    cfg: RewardTrainingConfig,
    directory: Path,
    evaluations: list[PreferenceEvaluation],
    pairs: int,
    *,
    seconds: float,
) -> dict[str, Any]:
    """What RUN/summary.json says."""
    scale = read_scale(directory / "model")
    counts = {name: count.record() for name, count in read_counts(directory / "pairs").items()}
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
    return summary | {
        "reference_score_mean": scale.mean,
        "reference_score_std": scale.deviation,
        "seconds": round(seconds, 1),
    }
