"""`ratchet evaluate`: a policy's answers to held-out prompts, scored by the sources and judges of a PPO config.

Runs in the driver.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from actors.pool.roles import ReferencePool, RewardPool
from common.config.ppo import Config
from common.errors import UserError
from common.files import write_json
from common.types import Prompt
from deploy.ending import signals
from deploy.needs import Phases, service_needs
from deploy.policy_files import PolicyFiles
from deploy.run.directory import run_owner
from deploy.run.error_files import ErrorFiles
from deploy.run.summary import write_answers
from deploy.screen.bar import Bars
from deploy.screen.console import Output
from deploy.screen.progress import evaluation_table
from deploy.session import load_inputs, session
from deploy.starting import Starter
from learner.loop.answers import Answer
from learner.loop.evaluation import Evaluation, evaluate
from learner.loop.prompts import heldout_prompts


def run_evaluation(cfg: Config, directory: Path, *, policy: str | None = None, force: bool = False) -> dict[str, Any]:
    """Evaluates `policy` (left out: model.path) against the reference model.path. Writes evaluation.json and
    answers.jsonl into `directory` and returns the evaluation's record."""
    if cfg.prompts.heldout is None or not cfg.evaluation.prompts:
        raise UserError("there are no prompts to evaluate on; set both prompts.heldout and evaluation.prompts")
    with run_owner(directory, force=force, can_resume=False) as owned:
        reference, judged = load_policies(cfg, policy)
        heldout = {"prompts.heldout": cfg.prompts.heldout}
        inputs = load_inputs(cfg, judged, cfg.reward, heldout, judges=cfg.evaluation.judges)
        prompts = heldout_prompts(inputs.records[0], cfg.evaluation.prompts)

        def phases(cfg: Config) -> Phases:
            return [service_needs(cfg, reference.size, inputs.reward_models)]

        with session(cfg, "evaluate", owned, phases, force=force) as (_, begin):
            begin()
            with Bars(console := Output()) as bars:
                evaluation, answers = signals.run(_evaluate(cfg, directory, judged, prompts, bars))
    write_answers(directory / "answers.jsonl", answers, judged.tokenizer)
    record = {"policy": judged.path, "reference": reference.path, **evaluation.record()}
    write_json(directory / "evaluation.json", record)
    console.print(evaluation_table({Path(judged.path).name: evaluation}))
    console.print(f"{directory}: evaluation.json, answers.jsonl", markup=False)
    return record


def load_policies(cfg: Config, policy: str | None) -> tuple[PolicyFiles, PolicyFiles]:
    """The reference and the policy to evaluate. Raises UserError if their tokenizers differ."""
    trust = cfg.model.trust_remote_code
    reference = PolicyFiles.load(cfg.model.path, trust_remote_code=trust)
    judged = PolicyFiles.load(policy, "--policy", trust_remote_code=trust) if policy else reference
    if judged.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise UserError(
            f"--policy ({policy}) and model.path ({cfg.model.path}) have different tokenizers, so there is no KL "
            "between them; set model.path to the policy's own reference"
        )
    return reference, judged


async def _evaluate(
    cfg: Config, directory: Path, policy: PolicyFiles, prompts: list[Prompt], bars: Bars
) -> tuple[Evaluation, list[Answer]]:
    """Starts the services and has the policy answer every prompt."""
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
        answered=lambda done: bars.show("evaluation", done, len(prompts)),
    )
