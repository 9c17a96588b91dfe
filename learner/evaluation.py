"""Held-out evaluation: what share of prompts the policy answers well enough, with an interval."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.config import EvaluationConfig
from common.metrics import wilson_interval
from common.types import Prompt, Rollout, Score, Void
from learner.roles import Generators, Reward


@dataclass(frozen=True)
class Evaluation:
    """One answer to each held-out prompt, sampled as in training, under one policy version."""

    policy_version: int
    prompts: int
    voids: int  # answers that could not be scored; they count as failed
    pass_at_1: float
    interval: tuple[float, float]  # 95 %
    score: float  # mean total score
    components: Mapping[str, float]  # mean raw score of each source
    response_tokens: float  # mean

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Evaluation:
        return cls(**{**record, "interval": tuple(record["interval"])})


async def evaluate(
    prompts: Sequence[Prompt], generators: Generators, reward: Reward, cfg: EvaluationConfig, *, policy_version: int
) -> Evaluation:
    """Asks every prompt once. Nothing of it is journalled or trained on."""

    async def ask(prompt: Prompt) -> tuple[Rollout, Score | Void]:
        rollout = await generators.generate(prompt)
        return rollout, await reward.score(rollout)

    answers = await asyncio.gather(*(ask(prompt) for prompt in prompts))
    scores = [score for _, score in answers if isinstance(score, Score)]
    source = cfg.pass_source or (next(iter(scores[0].components)) if scores else "")
    passed = sum(score.components[source] >= cfg.pass_score for score in scores)
    scored = max(1, len(scores))
    return Evaluation(
        policy_version=policy_version,
        prompts=len(prompts),
        voids=len(prompts) - len(scores),
        pass_at_1=passed / max(1, len(prompts)),
        interval=wilson_interval(passed, len(prompts)),
        score=sum(score.total for score in scores) / scored,
        components={
            name: sum(score.components[name] for score in scores) / scored
            for name in (scores[0].components if scores else ())
        },
        response_tokens=sum(len(rollout.response_ids) for rollout, _ in answers) / max(1, len(answers)),
    )
