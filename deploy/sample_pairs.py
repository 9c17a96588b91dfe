"""`ratchet sample-pairs`: two responses of a policy to each prompt, and a labeller's preference between them.

Runs in the driver.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.pool.roles import RewardPool
from common.config.reward_model import PairSamplingConfig
from common.data.prompt_records import PromptRecord
from common.errors import UserError
from common.files import append_record, read_records, write_json, write_whole
from common.types import Prompt, Rollout, Score, Void
from deploy.ending import signals
from deploy.plan.needs import Phases, generator_needs, reward_needs
from deploy.policy_files import PolicyFiles
from deploy.run.directory import RunDirectory, run_owner
from deploy.run.error_files import ErrorFiles
from deploy.run.finished import finished_pair_sampling
from deploy.screen.screen import Screen
from deploy.session import load_inputs, session
from deploy.starting import Starter
from learner.loop.answers import answer
from learner.loop.prompts import PromptStream

FEW_VOIDS = 8  # up to this many voids never end the run, whatever their share


def run_pair_sampling(
    cfg: PairSamplingConfig, directory: Path, *, resume: bool = False, force: bool = False
) -> dict[str, Any]:
    """Writes pairs.jsonl into `directory`, in the form that train-reward reads, and returns the summary."""
    with run_owner(directory, resume=resume, force=force) as owned:
        if resume and (finished := finished_pair_sampling(cfg, directory)) is not None:
            return finished
        return _run_in(owned, cfg, resume=resume, force=force)


def _run_in(owned: RunDirectory, cfg: PairSamplingConfig, *, resume: bool, force: bool) -> dict[str, Any]:
    started, directory = time.perf_counter(), owned.directory
    policy = PolicyFiles.load(cfg.model.path, trust_remote_code=cfg.model.trust_remote_code, packed=False)
    inputs = load_inputs(cfg, policy, cfg.labeller, {"prompts.source": cfg.prompts.source})
    [records] = inputs.records

    def phases(cfg: PairSamplingConfig) -> Phases:
        generators = generator_needs(cfg.generators, policy.size, max_tokens=cfg.max_sequence_tokens, updated=False)
        return [[*generators, *reward_needs("labeller", cfg.labeller, inputs.reward_models)]]

    screen = Screen(directory, log=owned.log)
    with session(cfg, "sample-pairs", owned, phases, resume=resume, force=force) as (_, begin):
        begin()
        screen.say(
            f"ratchet sample-pairs {policy.path} · {cfg.prompts.pairs} pairs over {len(records)} prompts · "
            f"seed {cfg.seed}\nrun directory {directory}; starting Ray actors ..."
        )
        try:
            with screen.bars:
                signals.run(_sample(cfg, directory, policy, records, screen))
        except ExceptionGroup as group:  # many pairs may fail for one reason; the first error is enough
            raise group.exceptions[0] from None
        summary = _finish(cfg, directory, seconds=time.perf_counter() - started)
    reason = f" (the last: {summary['last_void']})" if summary["voids"] else ""
    screen.say(
        f"{summary['pairs']} pairs in {directory / 'pairs.jsonl'}; left out: {summary['no_preference']} without a "
        f"preference and {summary['voids']} void{reason}; {summary['seconds']:.0f} s"
    )
    return summary


async def _sample(
    cfg: PairSamplingConfig, directory: Path, policy: PolicyFiles, records: Sequence[PromptRecord], screen: Screen
) -> None:
    """Appends a line to labelled.jsonl for each pair that has none yet, as soon as the pair is labelled."""
    start = Starter(cfg.ray, on_event=screen.pool, tell=screen.note)
    generators, labellers = await asyncio.gather(
        start.generators(policy, cfg.generators, cfg.sampling, seed=cfg.seed, max_tokens=cfg.max_sequence_tokens),
        start.rewards(cfg.labeller, policy=policy),
    )
    score = RewardPool(labellers, ErrorFiles(directory).keep).score
    stream = PromptStream(records, seed=cfg.seed, rollouts_per_prompt=2)
    done = {record["pair"] for record in read_records(directory / "labelled.jsonl") if "void" not in record}
    free = asyncio.Semaphore(2 * cfg.generators.max_replicas * cfg.generators.in_flight)  # pairs at the same time
    voids: list[str] = []

    async def label(number: int, prompts: tuple[Prompt, Prompt]) -> None:
        answers = await asyncio.gather(*(answer(prompt, generators, score) for prompt in prompts))
        rollouts, scores, _ = zip(*answers, strict=True)
        record = {"pair": number, **_preference(cfg, policy, rollouts, scores)}
        append_record(directory / "labelled.jsonl", record)
        done.add(number)
        screen.bars.show("pairs", len(done), cfg.prompts.pairs)
        if "void" in record:
            voids.append(record["void"])
        if len(voids) > max(cfg.labeller.max_void_share * len(done), FEW_VOIDS):
            raise UserError(
                f"{len(voids)} of {len(done)} pairs could not be labelled, more than labeller.max_void_share "
                f"({cfg.labeller.max_void_share:.0%}); the last reason: {voids[-1]}; fix it and continue with --resume"
            )
        free.release()

    screen.bars.show("pairs", len(done), cfg.prompts.pairs)
    async with asyncio.TaskGroup() as pairs:
        for number in range(cfg.prompts.pairs):
            prompts = stream.next(), stream.next()
            if number not in done:
                await free.acquire()
                pairs.create_task(label(number, prompts))


def _preference(
    cfg: PairSamplingConfig, policy: PolicyFiles, rollouts: Sequence[Rollout], scores: Sequence[Score | Void]
) -> dict[str, Any]:
    """The pair as train-reward reads it; {"void": reason} if a score is missing; {} if the scores are too close."""
    given = [score for score in scores if not isinstance(score, Void)]
    if len(given) < len(scores):
        return {"void": next(score.reason for score in scores if isinstance(score, Void))}
    chosen = int(given[1].total > given[0].total)
    rejected = 1 - chosen
    if given[chosen].total - given[rejected].total <= cfg.labeller.min_gap:
        return {}
    texts = [policy.tokenizer.decode(r.response_ids.tolist(), skip_special_tokens=True) for r in rollouts]
    return {
        "prompt": rollouts[0].prompt.messages or rollouts[0].prompt.text,
        "chosen": texts[chosen],
        "rejected": texts[rejected],
        "chosen_score": given[chosen].total,
        "rejected_score": given[rejected].total,
        "origins": given[0].origins,
    }


def _finish(cfg: PairSamplingConfig, directory: Path, *, seconds: float) -> dict[str, Any]:
    """Writes the labelled pairs into pairs.jsonl, in the order of the prompts, and writes summary.json."""
    newest = {record["pair"]: record for record in read_records(directory / "labelled.jsonl")}  # voids are tried again
    labelled = [newest[pair] for pair in sorted(newest)]
    pairs = [record for record in labelled if "chosen" in record]
    write_whole(directory / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    voids = [record["void"] for record in labelled if "void" in record]
    summary = {
        "seed": cfg.seed,
        "pairs": len(pairs),
        "voids": len(voids),
        "last_void": voids[-1] if voids else None,
        "no_preference": len(labelled) - len(pairs) - len(voids),
        "seconds": round(seconds, 1),
    }
    write_json(directory / "summary.json", summary)
    return summary
