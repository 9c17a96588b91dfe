"""`ratchet train`: who exists and how they are joined.

Read on from here in the order the README lists: common/types.py,
learner/loop/train_loop.py, actors/generation/generator.py, and so on is one prompt's way through the system.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.pool.membership import PoolEvent
from actors.pool.ray_actor import actor
from actors.pool.roles import ReferencePool, RewardPool
from common.config.ppo import Config
from common.data.prompt_records import PromptRecord
from common.errors import UserError
from common.files import append_record, read_records, write_json
from common.types import Experience, Prompt, Void
from deploy.capacity import check_kv_cache, check_object_store, needs, place
from deploy.cluster.addresses import named_address
from deploy.cluster.connection import cluster, dashboard, metrics_addresses
from deploy.ending import signals
from deploy.monitoring.endpoint import RunFigures
from deploy.run.already_done import finished_training
from deploy.run.directory import refuse_overwriting, sole_owner, write_answers
from deploy.run.error_files import ErrorFiles
from deploy.scale import follow_wishes, forget
from deploy.screen.progress import Progress
from deploy.source_checks import check_sources, check_unchanged, try_sources
from deploy.starting import PolicyFiles, Starter
from learner.loop.answers import Answer
from learner.loop.evaluation import Evaluation, win_rate
from learner.loop.journal import Journal
from learner.loop.prompts import PromptStream, heldout_prompts
from learner.loop.roles import Reference
from learner.loop.train_loop import Run, train
from learner.ppo.learner import Learner
from learner.ranks.group import AdapterReference, LearnerGroup


def run_training(cfg: Config, directory: Path, *, resume: bool = False, force: bool = False) -> dict[str, Any]:
    """Trains in `directory` and returns its summary.

    Everything a user can get wrong is checked first: a UserError leaves nothing written and nothing running.
    """
    started = time.perf_counter()
    if resume and (finished := finished_training(cfg, directory)) is not None:
        return finished
    policy = PolicyFiles.load(cfg.model.path, trust_remote_code=cfg.model.trust_remote_code)
    sources = [*cfg.reward.sources, *cfg.evaluation.judges]
    reward_models = check_sources(sources, chat=cfg.prompts.format == "chat")
    records, heldout_records = check_inputs(cfg, policy)
    try_sources(cfg.reward, sources, records[0], policy.tokenizer)
    prompts = PromptStream(records, seed=cfg.seed, rollouts_per_prompt=cfg.prompts.rollouts_per_prompt)
    heldout = heldout_prompts(heldout_records, cfg.evaluation.prompts)
    if not resume:
        refuse_overwriting(directory, force=force)
    elif last := Journal(directory / "journal").last():
        prompts.restore(last.prompts)  # refused now if these are not the run's prompts, not after minutes of replay
        check_unchanged(cfg.reward.sources, dict(last.table["origins"][0].as_py()))
    with RunFigures.served(cfg.monitoring) as figures, cluster(cfg.ray) as nodes:
        place(needs(cfg, policy.size, reward_models), nodes)
        with sole_owner(directory) as held:
            if resume:
                held.resume(cfg)
            else:
                held.begin(cfg, "train", force=force)
            forget(directory)
            progress = Progress(cfg, directory, policy.tokenizer)
            progress.begin(num_prompts=len(records), num_heldout=len(heldout))
            with figures.discoverable(directory, metrics_addresses()), rare_full_collections():
                training = _train(cfg, directory, policy, prompts, heldout, progress, figures)
                step_s = cfg.learner.timeout_s if cfg.checkpoint.on_signal else 0.0  # for the step under way
                evaluations = signals.run(training, grace_s=step_s)
    summary = summarise(cfg, directory, evaluations, seconds=time.perf_counter() - started)
    write_json(directory / "summary.json", summary)
    progress.end(evaluations, wins=summary.get("win_rate"), seconds=summary["seconds"])
    return summary


# Objects made beyond those that are gone, collections of the youngest, and collections of the younger, after which the
# next older ones are searched. Python's own are 700, 10 and 10.
COLLECT_AFTER = (10_000, 10, 100)


@contextmanager
def rare_full_collections() -> Iterator[None]:
    """Full garbage collections look for cycles through all that is outstanding, and hardly find any: what the loop
    makes goes by reference counts. What there is now lives as long as the run, and is not searched at all."""
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(*COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def _train(
    cfg: Config,
    directory: Path,
    policy: PolicyFiles,
    prompts: PromptStream,
    heldout: Sequence[Prompt],
    progress: Progress,
    figures: RunFigures,
) -> list[Evaluation]:
    """Starts every role, joins them in a Run, and trains."""

    def pool_changed(event: PoolEvent) -> None:
        append_record(directory / "pool-events.jsonl", {"time": time.time(), **asdict(event)})
        progress.pool(event)

    start = Starter(cfg.ray, on_event=pool_changed)
    ranks = [actor(Learner, cfg.learner, f"Learner({rank})").remote(cfg) for rank in range(cfg.learner.ranks)]
    learner = LearnerGroup(ranks, timeout_s=cfg.learner.timeout_s)

    async def start_reference() -> Reference:
        return AdapterReference(learner) if cfg.learner.lora is not None else ReferencePool(await start.references(cfg))

    def stepped(record: dict[str, Any], example: Experience, voids: list[Void]) -> None:
        figures.step(record)
        progress.step(record, example, voids)

    def evaluated(evaluation: Evaluation, answers: list[Answer]) -> None:
        write_answers(directory / _answers(evaluation), answers, policy.tokenizer)
        figures.evaluation(evaluation)
        progress.evaluation(evaluation)

    with ExitStack() as ending:
        ending.callback(learner.stop)
        ending.callback(start.stop)
        errors = ErrorFiles(directory)
        generators, rewards, reference, _ = await asyncio.gather(
            start.generators(policy, cfg.generators, cfg.sampling, seed=cfg.seed, max_tokens=cfg.max_sequence_tokens),
            start.rewards(cfg.reward, policy=policy, judges=cfg.evaluation.judges),
            start_reference(),
            learner.start(cfg.ray.startup_timeout_s),
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
            decode=policy.decode,
            on_step=stepped,
            on_evaluation=evaluated,
        )
        for beside in (follow_wishes(directory, start.pools), progress.while_silent(lambda: run.doing())):
            ending.callback(asyncio.create_task(beside).cancel)
        return await train(run)


def check_inputs(cfg: Config, policy: PolicyFiles) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Training and held-out prompts. Checks all that can be checked with nothing started; raises UserError."""
    check_kv_cache(cfg.generators, policy.size, max_tokens=cfg.max_sequence_tokens)
    if named_address(cfg.ray) is None:  # the store of another cluster was made by whoever started it
        check_object_store(cfg.ray, policy.size)

    def load(source: str, setting: str) -> list[PromptRecord]:
        return policy.load_prompts(source, cfg.prompts, cfg.sampling, seed=cfg.seed, setting=setting)

    train_records = load(cfg.prompts.train, "prompts.train")
    wanted = cfg.prompts.heldout if cfg.evaluation.prompts else None
    heldout = load(wanted, "prompts.heldout") if wanted is not None else []
    if shared := {r.text for r in train_records} & {r.text for r in heldout}:
        raise UserError(
            f"{len(shared)} prompt(s) stand in both prompts.train and prompts.heldout, such as {min(shared)!r}; "
            "an evaluation on prompts that were trained on says nothing: take them out of one"
        )
    return train_records, heldout


def summarise(cfg: Config, directory: Path, evaluations: Sequence[Evaluation], *, seconds: float) -> dict[str, Any]:
    """What RUN/summary.json says. pass@1 is in it where both evaluations have one."""
    summary: dict[str, Any] = {"seed": cfg.seed, "num_steps": cfg.num_steps, "seconds": round(seconds, 1)}
    if evaluations:
        before, after = evaluations[0], evaluations[-1]
        if before.pass_at_1 is not None and after.pass_at_1 is not None:
            summary |= {
                "pass_at_1_before": before.pass_at_1,
                "pass_at_1_before_interval": before.interval,
                "pass_at_1_after": after.pass_at_1,
                "pass_at_1_after_interval": after.interval,
            }
        summary |= {
            "score_before": before.score,
            "score_after": after.score,
            "win_rate": _win_rate(directory, before, after),
            "heldout_prompts": after.prompts,
            "before": before.record(),
            "after": after.record(),
        }
    return summary


def _answers(evaluation: Evaluation) -> str:
    """Where the run directory has its answers."""
    return f"answers/version-{evaluation.policy_version:06d}.jsonl"


def _win_rate(directory: Path, before: Evaluation, after: Evaluation) -> float | None:
    """None if there was one evaluation only, or if answers are missing."""
    scores = [
        [a.get("score") for a in read_records(directory / _answers(evaluation))] for evaluation in (before, after)
    ]
    if before.policy_version == after.policy_version or not len(scores[0]) == len(scores[1]) == after.prompts:
        return None
    return win_rate(*scores)
