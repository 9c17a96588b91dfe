"""`ratchet sample-pairs`: two responses of a policy to each prompt, and a labeller's preference between them."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress as ProgressBar

from actors.pool.roles import RewardPool
from common.config.reward_model import PairSamplingConfig
from common.data.prompt_records import PromptRecord
from common.errors import UserError
from common.files import append_record, read_records, write_json, write_whole
from common.types import Prompt, Rollout, Void
from deploy.capacity import check_kv_cache, generator_needs, place, reward_needs
from deploy.cluster.connection import cluster
from deploy.ending import signals
from deploy.run.already_done import finished_pair_sampling
from deploy.run.directory import refuse_overwriting, sole_owner
from deploy.run.error_files import ErrorFiles
from deploy.screen.console import Output
from deploy.screen.screen import Screen
from deploy.source_checks import check_sources, try_sources
from deploy.starting import PolicyFiles, Starter
from learner.loop.answers import answer
from learner.loop.prompts import PromptStream

FEW_VOIDS = 8  # so few say nothing about a labeller yet


def run_pair_sampling(
    cfg: PairSamplingConfig, directory: Path, *, resume: bool = False, force: bool = False
) -> dict[str, Any]:
    """Leaves pairs.jsonl in `directory`, as train-reward reads it, and returns the summary."""
    started = time.perf_counter()
    if resume and (finished := finished_pair_sampling(cfg, directory)) is not None:
        return finished
    policy = PolicyFiles.load(cfg.model.path, trust_remote_code=cfg.model.trust_remote_code, packed=False)
    reward_models = check_sources(cfg.labeller.sources, chat=cfg.prompts.format == "chat")
    check_kv_cache(cfg.generators, policy.size, max_tokens=cfg.max_sequence_tokens)
    records = policy.load_prompts(
        cfg.prompts.source, cfg.prompts, cfg.sampling, seed=cfg.seed, setting="prompts.source"
    )
    try_sources(cfg.labeller, cfg.labeller.sources, records[0], policy.tokenizer)
    if not resume:
        refuse_overwriting(directory, force=force)
    console = Output()
    with cluster(cfg.ray) as nodes:
        needed = [
            *generator_needs(cfg.generators, policy.size),
            *reward_needs("labeller", cfg.labeller, reward_models),
        ]
        place(needed, nodes)
        with sole_owner(directory) as held:
            if resume:
                held.resume(cfg)
            else:
                held.begin(cfg, "sample-pairs", force=force)
            console.print(
                f"ratchet sample-pairs {policy.path} · {cfg.prompts.pairs} pairs over {len(records)} prompts · "
                f"seed {cfg.seed}\nrun directory {directory}; starting Ray actors ...",
                markup=False,
                soft_wrap=True,
            )
            try:
                signals.run(_sample(cfg, directory, policy, records, console))
            except ExceptionGroup as group:  # many pairs may fail of one cause; the first tells it
                raise group.exceptions[0] from None
            summary = _finish(cfg, directory, seconds=time.perf_counter() - started)
    reason = f" (the last: {summary['last_void']})" if summary["voids"] else ""
    console.print(
        f"{summary['pairs']} pairs in {directory / 'pairs.jsonl'}, {summary['no_preference']} without a preference "
        f"and {summary['voids']} void left out{reason}; {summary['seconds']:.0f} s",
        markup=False,
        soft_wrap=True,
    )
    return summary


async def _sample(
    cfg: PairSamplingConfig, directory: Path, policy: PolicyFiles, records: list[PromptRecord], console: Output
) -> None:
    """Adds one line to labelled.jsonl for each pair that has none yet, as soon as it is labelled."""
    start = Starter(cfg.ray, on_event=Screen(directory).pool)
    generators, labellers = await asyncio.gather(
        start.generators(policy, cfg.generators, cfg.sampling, seed=cfg.seed, max_tokens=cfg.max_sequence_tokens),
        start.rewards(cfg.labeller, policy=policy),
    )
    score = RewardPool(labellers, ErrorFiles(directory).keep).score
    stream = PromptStream(records, seed=cfg.seed, rollouts_per_prompt=2)
    done = {record["pair"] for record in read_records(directory / "labelled.jsonl") if "void" not in record}

    room = asyncio.Semaphore(2 * cfg.generators.max_replicas * cfg.generators.in_flight)  # pairs begun at a time
    voids: list[str] = []

    async def label(number: int, prompts: tuple[Prompt, Prompt]) -> None:
        answers = await asyncio.gather(*(answer(prompt, generators, score) for prompt in prompts))
        rollouts, scores, _ = zip(*answers, strict=True)
        record: dict[str, Any] = {"pair": number}
        given = [result for result in scores if not isinstance(result, Void)]
        totals = [result.total for result in given]
        if len(given) < len(scores):
            record["void"] = next(result.reason for result in scores if isinstance(result, Void))
            voids.append(record["void"])
        else:
            better = int(totals[1] > totals[0])
            if abs(totals[1] - totals[0]) > cfg.labeller.min_gap:
                record |= {
                    "prompt": prompts[0].messages or prompts[0].text,
                    "chosen": _text(policy, rollouts[better]),
                    "rejected": _text(policy, rollouts[1 - better]),
                    "chosen_score": totals[better],
                    "rejected_score": totals[1 - better],
                    "origins": given[0].origins,
                }
        append_record(directory / "labelled.jsonl", record)
        bar.advance(task)
        done.add(number)
        if len(voids) > max(cfg.labeller.max_void_share * len(done), FEW_VOIDS):
            raise UserError(
                f"{len(voids)} of {len(done)} pairs could not be labelled, more than labeller.max_void_share "
                f"({cfg.labeller.max_void_share:.0%}); the last reason: {voids[-1]}; mend it and go on with --resume"
            )
        room.release()

    with ProgressBar(console=console, transient=True) as bar:
        task = bar.add_task("sampling and labelling", total=cfg.prompts.pairs, completed=len(done))
        async with asyncio.TaskGroup() as pairs:
            for number in range(cfg.prompts.pairs):
                prompts = stream.next(), stream.next()
                if number not in done:
                    await room.acquire()
                    pairs.create_task(label(number, prompts))


def _text(policy: PolicyFiles, rollout: Rollout) -> str:
    return policy.tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True)


def _finish(cfg: PairSamplingConfig, directory: Path, *, seconds: float) -> dict[str, Any]:
    """labelled.jsonl to pairs.jsonl, in the order of the prompts, and summary.json."""
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
