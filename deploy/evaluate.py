"""`ratchet evaluate`: a policy's answers to held-out prompts, scored by the sources and judges of a PPO config."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from actors.pool.roles import ReferencePool, RewardPool
from common.config.ppo import Config
from common.errors import UserError
from common.files import write_json
from common.types import Prompt
from deploy.capacity import check_kv_cache, place, service_needs
from deploy.cluster.connection import cluster
from deploy.ending import signals
from deploy.run.directory import refuse_overwriting, sole_owner, write_answers
from deploy.run.error_files import ErrorFiles
from deploy.screen.console import Output
from deploy.screen.progress import evaluation_table
from deploy.source_checks import check_sources, try_sources
from deploy.starting import PolicyFiles, Starter
from learner.loop.answers import Answer
from learner.loop.evaluation import Evaluation, evaluate
from learner.loop.prompts import heldout_prompts


def run_evaluation(cfg: Config, directory: Path, *, policy: str | None = None, force: bool = False) -> dict[str, Any]:
    """Evaluates `policy` (left out: model.path) against the reference model.path; leaves evaluation.json and
    answers.jsonl in `directory` and returns the evaluation's record."""
    if cfg.prompts.heldout is None or not cfg.evaluation.prompts:
        raise UserError("prompts.heldout and evaluation.prompts must say what to ask; set both")
    trust = cfg.model.trust_remote_code
    reference = PolicyFiles.load(cfg.model.path, trust_remote_code=trust)
    judged = PolicyFiles.load(policy, "--policy", trust_remote_code=trust) if policy else reference
    if judged.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise UserError(
            f"--policy ({policy}) and model.path ({cfg.model.path}) have different tokenizers, so there is no KL "
            "between them; set model.path to the policy's own reference"
        )
    sources = [*cfg.reward.sources, *cfg.evaluation.judges]
    reward_models = check_sources(sources, chat=cfg.prompts.format == "chat")
    check_kv_cache(cfg.generators, judged.size, max_tokens=cfg.max_sequence_tokens)
    records = judged.load_prompts(
        cfg.prompts.heldout, cfg.prompts, cfg.sampling, seed=cfg.seed, setting="prompts.heldout"
    )
    prompts = heldout_prompts(records, cfg.evaluation.prompts)
    try_sources(cfg.reward, sources, records[0], judged.tokenizer)
    refuse_overwriting(directory, force=force, can_resume=False)
    with cluster(cfg.ray) as nodes:
        place(service_needs(cfg, reference.size, reward_models), nodes)
        with sole_owner(directory) as held:
            held.begin(cfg, "evaluate", force=force)
            evaluation, answers = signals.run(_evaluate(cfg, directory, judged, prompts))
    write_answers(directory / "answers.jsonl", answers, judged.tokenizer)
    record = {"policy": judged.path, "reference": reference.path, **evaluation.record()}
    write_json(directory / "evaluation.json", record)
    console = Output()
    console.print(evaluation_table({Path(judged.path).name: evaluation}))
    console.print(f"{directory}: evaluation.json, answers.jsonl", markup=False)
    return record


async def _evaluate(
    cfg: Config, directory: Path, policy: PolicyFiles, prompts: list[Prompt]
) -> tuple[Evaluation, list[Answer]]:
    start = Starter(cfg.ray, on_event=lambda event: None)
    generators, rewards, references = await asyncio.gather(
        start.generators(policy, cfg.generators, cfg.sampling, seed=cfg.seed, max_tokens=cfg.max_sequence_tokens),
        start.rewards(cfg.reward, policy=policy, judges=cfg.evaluation.judges),
        start.references(cfg),
    )
    return await evaluate(
        prompts,
        generators,
        RewardPool(rewards, ErrorFiles(directory).keep),
        ReferencePool(references),
        cfg.evaluation,
        policy_version=0,
        max_void_share=cfg.reward.max_void_share,
    )
