"""Held-out evaluation: how well the policy answers prompts it never trained on, and at what cost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common.config import EvaluationConfig, UserError
from common.metrics import wilson_interval
from common.types import Prompt, Rollout, RolloutLostError, Score, Void
from learner.roles import Generators, Reference, Reward

Answer = tuple[Rollout, Score | Void]


@dataclass(frozen=True)
class Evaluation:
    """One answer to each held-out prompt, sampled as in training, under one policy version."""

    policy_version: int
    prompts: int
    voids: int  # answers that could not be scored; they count as failed
    void_reason: str  # the most frequent one
    pass_at_1: float
    interval: tuple[float, float]  # 95 %
    score: float  # mean total score
    components: Mapping[str, float]  # mean raw score of each source and judge
    kl_per_response: float  # from the reference, nats: mean of sum(rollout_logprobs - ref_logprobs)
    response_tokens: float  # mean
    distinct_1: float  # distinct tokens over tokens, all answers together (Li et al. 2016, arXiv:1510.03055)
    distinct_2: float  # the same of token pairs; falls when answers grow alike

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Evaluation:
        return cls(**{**record, "interval": tuple(record["interval"])})


async def evaluate(
    prompts: Sequence[Prompt],
    generators: Generators,
    reward: Reward,
    reference: Reference | None,
    cfg: EvaluationConfig,
    *,
    policy_version: int,
    max_void_share: float = 1.0,
) -> tuple[Evaluation, list[Answer]]:
    """Asks every prompt once. Nothing of it is journalled or trained on. `reference` is None if the policy itself is.
    Raises UserError when more than `max_void_share` of the answers cannot be scored."""

    async def answered(prompt: Prompt) -> tuple[Rollout, Score | Void, np.ndarray]:
        while True:
            with suppress(RolloutLostError):
                return await ask(prompt)

    async def ask(prompt: Prompt) -> tuple[Rollout, Score | Void, np.ndarray]:
        written = await generators.generate(prompt)
        if reference is None:
            score, [rollout] = await asyncio.gather(reward.judge(written), generators.fetch([written.rollout]))
            return _there(rollout), score, rollout.rollout_logprobs
        score, (ref_logprobs, _) = await asyncio.gather(reward.judge(written), reference.logprobs(written))
        rollout, ref = await generators.fetch([written.rollout, ref_logprobs])
        return _there(rollout), score, _there(ref)

    answers = await asyncio.gather(*(answered(prompt) for prompt in prompts))
    scores = [score for _, score, _ in answers if isinstance(score, Score)]
    voids = [score.reason for _, score, _ in answers if isinstance(score, Void)]
    if len(voids) > max_void_share * len(answers):
        raise UserError(
            f"{len(voids)} of {len(answers)} held-out answers could not be scored, more than reward.max_void_share "
            f"({max_void_share:.0%}); most often: {Counter(voids).most_common(1)[0][0]}; mend it and try "
            "again, or raise the share"
        )
    source = cfg.pass_source or (next(iter(scores[0].components)) if scores else "")
    passed = sum(score.components[source] >= cfg.pass_score for score in scores)
    scored, asked = max(1, len(scores)), max(1, len(answers))
    responses = [rollout.response_ids for rollout, _, _ in answers]
    evaluation = Evaluation(
        policy_version=policy_version,
        prompts=len(prompts),
        voids=len(voids),
        void_reason=Counter(voids).most_common(1)[0][0] if voids else "",
        pass_at_1=passed / max(1, len(prompts)),
        interval=wilson_interval(passed, len(prompts)),
        score=sum(score.total for score in scores) / scored,
        components={
            name: sum(score.components[name] for score in scores) / scored
            for name in (scores[0].components if scores else ())
        },
        kl_per_response=sum(float((r.rollout_logprobs - ref).sum()) for r, _, ref in answers) / asked,
        response_tokens=sum(map(len, responses)) / asked,
        distinct_1=distinct(responses, 1),
        distinct_2=distinct(responses, 2),
    )
    return evaluation, [(rollout, score) for rollout, score, _ in answers]


def _there(fetched: Any) -> Any:
    if isinstance(fetched, BaseException):
        raise fetched
    return fetched


def distinct(responses: Sequence[np.ndarray], n: int) -> float:
    """Distinct token n-grams over all n-grams of the responses; 0 if there are none."""
    grams = [gram for ids in responses for gram in zip(*(ids[i:].tolist() for i in range(n)))]
    return len(set(grams)) / len(grams) if grams else 0.0
