"""`ratchet train-reward`: preference pairs to a reward model, and to the scale that its scores are reported on."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from actors.pool.ray_actor import actor
from actors.pool.roles import RewardPool
from common.config.actors import PromptFormat, SourcesConfig
from common.config.reward_model import RewardTrainingConfig
from common.config.sources import ModelSourceConfig
from common.data.prompt_records import PromptRecord, prompt_record
from common.errors import UserError
from common.files import write_json
from common.model.reward_head import (
    ScoreScale,
    check_reward_files,
    is_reward_model,
    read_scale,
    scored_padding_id,
    write_scale,
)
from common.types import HELDOUT_EPOCH, Prompt, SampleId, Score
from deploy.capacity import check_kv_cache, generator_needs, place, reward_needs, trainer_needs
from deploy.cluster.connection import cluster
from deploy.ending import signals
from deploy.run.already_done import finished_reward_training
from deploy.run.directory import RunDirectory, refuse_overwriting, sole_owner
from deploy.screen.reward_progress import RewardProgress, plot_calibration
from deploy.starting import PolicyFiles, Starter
from learner.loop.answers import answer
from learner.ranks.group import RewardTrainerGroup
from learner.reward_model.calibration import PreferenceEvaluation
from learner.reward_model.pairs import PairCounts, Pairs, split, tokenise_pairs, without_prompts_of
from learner.reward_model.training import RewardRun, RewardTrainer, steps_per_epoch, train_reward_model

SOURCE = "reward"  # the model's name among the sources of the service that scores the reference policy's responses


def run_reward_training(
    cfg: RewardTrainingConfig, directory: Path, *, resume: bool = False, force: bool = False
) -> dict[str, Any]:
    """Trains in `directory`, leaves the model in RUN/model, and returns the summary.

    Everything a user can get wrong is checked first, every record included: a UserError leaves nothing written and
    nothing running.
    """
    started = time.perf_counter()
    if resume and (finished := finished_reward_training(cfg, directory)) is not None:
        return finished
    trust = cfg.model.trust_remote_code
    base = PolicyFiles.load(cfg.model.path, trust_remote_code=trust, packed=False)
    reference = base
    if cfg.scale.policy:
        reference = PolicyFiles.load(cfg.scale.policy, "scale.policy", trust_remote_code=trust, packed=False)
    check_reward_files(base.directory)
    if not resume:
        refuse_overwriting(directory, force=force)
    elif not (directory / "pairs/counts.json").exists():
        raise UserError(f"{directory} was stopped before it held its pairs; begin again with --force")
    progress = RewardProgress(cfg, directory)
    with prepared_pairs(cfg, base, directory, resume=resume) as pairs:
        train, heldout = load_pairs(cfg, pairs)
        counts = json.loads((pairs / "counts.json").read_text(encoding="utf-8"))
        prompts = check_inputs(cfg, base, reference, train, heldout, counts)

        def begin(held: RunDirectory) -> None:
            """From here on the run directory is this run's."""
            if resume:
                held.resume(cfg)
            else:
                held.begin(cfg, "train-reward", force=force)
                shutil.move(pairs, directory / "pairs")  # what is mapped stays readable
            progress.begin(counts, len(train), len(heldout))

        with cluster(cfg.ray) as nodes:
            place(trainer_needs(cfg.learner, base.size, row=2 * cfg.data.max_tokens), nodes)
            if prompts:
                service = reward_needs("learner", _service(cfg, directory), [base.size])
                place([*generator_needs(cfg.generators, reference.size), *service], nodes)
            with sole_owner(directory) as held:
                training = _train(cfg, directory, train, heldout, partial(begin, held), progress)
                step_s = cfg.learner.timeout_s if cfg.checkpoint.on_signal else 0.0  # for the step under way
                evaluations = signals.run(training, grace_s=step_s)
                if prompts:
                    signals.run(_measure(cfg, directory, reference, prompts, progress))
    if evaluations:
        plot_calibration(evaluations[-1], directory / "calibration.png")
    scale = read_scale(directory / "model") if prompts else None
    summary = summarise(cfg, counts, evaluations, scale, len(train), seconds=time.perf_counter() - started)
    write_json(directory / "summary.json", summary)
    progress.end(evaluations, scale, seconds=summary["seconds"])
    return summary


@contextmanager
def prepared_pairs(cfg: RewardTrainingConfig, base: PolicyFiles, directory: Path, *, resume: bool) -> Iterator[Path]:
    """A directory with every record read, checked and tokenised: train.arrow, heldout.arrow, counts.json. That of the
    run if it goes on; else one beside it, which is gone afterwards."""
    if resume:
        yield directory / "pairs"
        return
    beside = next(parent for parent in directory.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=beside, prefix=".ratchet-") as staging:
        target = Path(staging) / "pairs"
        target.mkdir()
        pad_id = scored_padding_id(base.directory)
        counts: dict[str, Any] = {}
        for name, source in (("train", cfg.data.train), ("heldout", cfg.data.heldout)):
            if source is not None:
                path = target / f"{name}.arrow"
                counts[name] = tokenise_pairs(
                    source,
                    cfg.data,
                    base.tokenizer,
                    path,
                    pad_id=pad_id,
                    seed=cfg.seed,
                    vocabulary=base.size.vocabulary,
                    setting=f"data.{name}",
                ).record()
        if cfg.data.heldout is not None:
            counts["heldout"]["prompt_in_train"] = counts["heldout"]["pairs"] - len(load_pairs(cfg, target)[1])
        write_json(target / "counts.json", counts)
        yield target


def load_pairs(cfg: RewardTrainingConfig, directory: Path) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs, no prompt in both."""
    pairs = Pairs(directory / "train.arrow")
    if cfg.data.heldout is not None:
        return pairs, without_prompts_of(Pairs(directory / "heldout.arrow"), pairs)
    return split(pairs, cfg.data.heldout_pairs, seed=cfg.seed)


def check_inputs(
    cfg: RewardTrainingConfig,
    base: PolicyFiles,
    reference: PolicyFiles,
    train: Pairs,
    heldout: Pairs,
    counts: Mapping[str, Any],
) -> list[Prompt]:
    """What the reference policy will be asked; none if the config wants none. Raises UserError."""
    if not train:
        held = f", of which {len(heldout)} are held out with all pairs of their prompts" if heldout else ""
        raise UserError(
            f"data.train ({cfg.data.train}) leaves no pair to train on: it has {_counted(counts['train'])}{held}; give "
            "more, or hold out fewer (data.heldout_pairs)"
        )
    if (steps := cfg.epochs * steps_per_epoch(len(train), cfg)) <= cfg.optimizer.warmup_steps:
        raise UserError(
            f"optimizer.warmup_steps ({cfg.optimizer.warmup_steps}) must be below the {steps} steps that {len(train)} "
            f"pairs make; lower it, or lower pairs_per_step ({cfg.pairs_per_step})"
        )
    if cfg.data.max_tokens > base.size.context:
        raise UserError(
            f"data.max_tokens ({cfg.data.max_tokens}) exceeds the model's context of {base.size.context}; lower it"
        )
    if (cfg.data.heldout or cfg.data.heldout_pairs) and not heldout:
        found = counts.get("heldout", counts["train"])
        shared = found.get("prompt_in_train", 0)
        raise UserError(
            f"no held-out pair is left: the data has {_counted(found)}, and {shared} pairs have their prompt in "
            "data.train too; give others"
        )
    return reference_prompts(cfg, reference, train) if cfg.scale.responses else []


def _counted(counts: Mapping[str, int]) -> str:
    return str(PairCounts(**{key: count for key, count in counts.items() if key != "prompt_in_train"}))


def reference_prompts(cfg: RewardTrainingConfig, reference: PolicyFiles, pairs: Pairs) -> list[Prompt]:
    """`scale.responses` prompts of the pairs, in seeded order, several samples of each where there are fewer. Raises
    UserError if there is none that fits."""
    if is_reward_model(reference.directory):
        raise UserError(
            f"scale.policy ({reference.path}) is itself a reward model and cannot answer; name the policy that PPO "
            "will start from, or set scale.responses = 0"
        )
    room = reference.prompt_room(cfg.data.max_tokens, cfg.sampling)
    check_kv_cache(cfg.generators, reference.size, max_tokens=room + cfg.sampling.max_new_tokens)
    form = PromptFormat(
        format=cfg.data.format,
        max_tokens=room,
        roles=cfg.data.roles,
        last_assistant=cfg.data.last_assistant,
        last_end_token=cfg.data.last_end_token,
    )
    _, firsts = np.unique(pairs.prompt_hashes(), return_index=True)
    records: list[PromptRecord] = []
    for index in np.random.default_rng([cfg.seed, 2]).permutation(firsts):
        if prompt := pairs.prompt(int(index)):
            with suppress(UserError):  # the reference's template may refuse what the model's took
                record = prompt_record(
                    "", {"prompt": prompt}, form, reference.tokenizer, vocabulary=reference.size.vocabulary
                )
                if record is not None and len(record.token_ids) <= room:
                    records.append(record)
        if len(records) == cfg.scale.responses:
            break
    if not records:
        raise UserError(
            "scale.responses wants responses to the prompts of the pairs, but these have none that fit; give the "
            "records a `prompt`, or set scale.responses = 0"
        )
    return [
        Prompt(SampleId(HELDOUT_EPOCH, i % len(records), i // len(records)), r.text, r.token_ids, r.fields, r.messages)
        for i, r in zip(range(cfg.scale.responses), cycle(records))
    ]


async def _train(
    cfg: RewardTrainingConfig,
    directory: Path,
    train: Pairs,
    heldout: Pairs,
    begin: Callable[[], None],
    progress: RewardProgress,
) -> list[PreferenceEvaluation]:
    num_steps = cfg.epochs * steps_per_epoch(len(train), cfg)
    ranks = [
        actor(RewardTrainer, cfg.learner, f"RewardTrainer({rank})").remote(cfg, num_steps)
        for rank in range(cfg.learner.ranks)
    ]
    group = RewardTrainerGroup(ranks, timeout_s=cfg.learner.timeout_s)
    try:
        await group.start(cfg.ray.startup_timeout_s)
        begin()
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
    start, service = Starter(cfg.ray, on_event=progress.pool), _service(cfg, directory)
    longest = cfg.data.max_tokens + cfg.sampling.max_new_tokens
    generators, rewards = await asyncio.gather(
        start.generators(reference, cfg.generators, cfg.sampling, seed=cfg.seed, max_tokens=longest),
        start.rewards(service, policy=reference),
    )
    score = RewardPool(rewards).score

    async def one(prompt: Prompt) -> float:
        _, result, _ = await answer(prompt, generators, score)
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
    """The trained model as a reward service, placed as the trainer was."""
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
    counts: dict[str, Any],
    evaluations: list[PreferenceEvaluation],
    scale: ScoreScale | None,
    pairs: int,
    *,
    seconds: float,
) -> dict[str, Any]:
    """What RUN/summary.json says."""
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
