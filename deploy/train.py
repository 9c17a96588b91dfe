"""`ratchet train`: who exists and how they are joined.

Read on from here in the order the README lists: common/types.py, learner/train_loop.py, actors/generator.py, and so on
is one prompt's way through the system.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.engine import Engine
from actors.generator import Generator
from actors.pool import GeneratorPool, Pool, ReferencePool, RewardPool, actor
from actors.reference_policy import ReferencePolicy
from actors.reward_functions import Reward
from common.config import Config, UserError
from common.functions import load_function
from common.journal import Journal
from common.models import ModelSize, end_token_ids, load_tokenizer, model_size, resolve_model
from common.prompts import PromptRecord, PromptStream, heldout_prompts, load_records
from common.types import Prompt
from deploy.cluster import cluster
from deploy.placement import check_caches, needs, place
from deploy.progress import Progress
from deploy.run_directory import clear, refuse_overwriting, sole_owner, write_config
from learner.evaluation import Evaluation
from learner.group import LearnerGroup
from learner.learner import Learner
from learner.train_loop import Run, train


def run_training(cfg: Config, directory: Path, *, resume: bool = False, force: bool = False) -> dict[str, Any]:
    """Trains in `directory` and returns its summary.

    Everything a user can get wrong is checked first: a UserError leaves nothing written and nothing running.
    """
    started = time.perf_counter()
    model = resolve_model(cfg.model.path)
    tokenizer = load_tokenizer(model)
    size = model_size(model)
    records, heldout_records = check_inputs(cfg, size, tokenizer)
    prompts = PromptStream(records, seed=cfg.seed, rollouts_per_prompt=cfg.prompts.rollouts_per_prompt)
    heldout = heldout_prompts(heldout_records, cfg.evaluation.prompts)
    if not resume:
        refuse_overwriting(directory, force=force)
    elif last := Journal(directory / "journal").last():
        prompts.restore(last.prompts)  # refused now if these are not the run's prompts, not after minutes of replay
    with cluster(cfg.ray) as nodes:
        place(needs(cfg, size), nodes)
        with sole_owner(directory):
            if not resume:
                clear(directory)
            write_config(directory, cfg)
            progress = Progress(cfg, directory, tokenizer)
            progress.begin(num_prompts=len(records), num_heldout=len(heldout))
            engine = partial(make_engine, cfg, size.context, end_token_ids(model, tokenizer))
            evaluations = asyncio.run(_train(cfg, directory, engine, prompts, heldout, progress))
    summary = summarise(cfg, evaluations, seconds=time.perf_counter() - started)
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    progress.end(evaluations, seconds=summary["seconds"])
    return summary


async def _train(
    cfg: Config,
    directory: Path,
    engine: Callable[[], Engine],
    prompts: PromptStream,
    heldout: Sequence[Prompt],
    progress: Progress,
) -> list[Evaluation]:
    """Starts every role, joins them in a Run, and trains."""
    pool = partial(Pool.start, startup_timeout_s=cfg.ray.startup_timeout_s, on_loss=progress.lost)
    path, temperature = cfg.model.path, cfg.sampling.temperature
    learner = LearnerGroup(
        [actor(Learner, cfg.learner).remote(cfg) for _ in range(cfg.learner.ranks)], timeout_s=cfg.learner.timeout_s
    )
    generators, rewards, references, _ = await asyncio.gather(
        pool(Generator, cfg.generators, cfg.seed, engine),
        pool(Reward, cfg.reward, cfg.reward, model=path),
        pool(ReferencePolicy, cfg.reference, cfg.reference, model=path, temperature=temperature),
        learner.start(cfg.ray.startup_timeout_s),
    )
    progress.ready(generators=len(generators), rewards=len(rewards), references=len(references))
    run = Run(
        cfg=cfg,
        directory=directory,
        prompts=prompts,
        heldout=heldout,
        generators=GeneratorPool(generators),
        reward=RewardPool(rewards),
        reference=ReferencePool(references),
        learner=learner,
        on_step=progress.step,
        on_evaluation=progress.evaluation,
    )
    return await train(run)


def make_engine(cfg: Config, context: int, end_tokens: list[int]) -> Engine:
    """Called in the generator's process: only there is vLLM imported."""
    from actors.vllm_engine import VLLMEngine

    return VLLMEngine(
        resolve_model(cfg.model.path),
        cfg.generators,
        cfg.sampling,
        max_model_len=min(cfg.max_sequence_tokens, context),
        end_token_ids=end_tokens,
    )


def check_inputs(
    cfg: Config, size: ModelSize, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Training and held-out prompts. Checks all that can be checked with nothing started; raises UserError."""
    for source in cfg.reward.sources:
        if source.function is not None:
            load_function(source.function, f"reward source {source.name}")
    room = min(cfg.prompts.max_tokens, size.context - cfg.sampling.max_new_tokens)
    if room < 1:
        raise UserError(
            f"sampling.max_new_tokens ({cfg.sampling.max_new_tokens}) leaves no room for a prompt in the model's "
            f"context of {size.context} tokens; lower it"
        )

    check_caches(cfg, size)

    def load(source: str) -> list[PromptRecord]:
        return load_records(source, cfg.prompts, tokenizer, seed=cfg.seed, max_tokens=room)

    train_records = load(cfg.prompts.train)
    heldout = load(cfg.prompts.heldout) if cfg.prompts.heldout and cfg.evaluation.prompts else []
    if shared := {r.text for r in train_records} & {r.text for r in heldout}:
        raise UserError(
            f"{len(shared)} prompt(s) stand in both prompts.train and prompts.heldout, such as {min(shared)!r}; "
            "an evaluation on prompts that were trained on says nothing: take them out of one"
        )
    return train_records, heldout


def summarise(cfg: Config, evaluations: Sequence[Evaluation], *, seconds: float) -> dict[str, Any]:
    """What RUN/summary.json says."""
    summary: dict[str, Any] = {"seed": cfg.seed, "num_steps": cfg.num_steps, "seconds": round(seconds, 1)}
    if evaluations:
        before, after = evaluations[0], evaluations[-1]
        summary |= {
            "pass_at_1_before": before.pass_at_1,
            "pass_at_1_before_interval": before.interval,
            "pass_at_1_after": after.pass_at_1,
            "pass_at_1_after_interval": after.interval,
            "heldout_prompts": after.prompts,
        }
    return summary
