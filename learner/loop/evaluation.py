"""Held-out evaluation: how well the policy answers prompts that it never trained on. Runs in the driver."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from common.config.ppo import EvaluationConfig
from common.errors import UserError
from common.proportions import wilson_interval
from common.types import Prompt, Score, Void
from learner.evaluation.diversity import distinct, messages
from learner.loop.answers import Answer, Answered, answer
from learner.loop.judges import voids_by_judge
from learner.loop.roles import Generators, Reference, Reward


@dataclass(frozen=True)
class Evaluation:
    """One answer to each held-out prompt, sampled as in training, under one policy version."""

    policy_version: int
    prompts: int
    voids: int  # answers without a score; they count as failed, and in no other figure
    void_reason: str  # the most frequent one
    pass_at_1: float | None  # None: scores other than 0 and 1, and no `evaluation.pass_source`
    interval: tuple[float, float] | None  # 95 %, of pass_at_1
    score: float  # mean total score
    components: Mapping[str, float]  # mean raw score of each source and judge
    kl_per_response: float  # from the reference, nats: mean of sum(rollout_logprobs - ref_logprobs)
    response_tokens: float  # mean
    distinct_1: float  # distinct tokens divided by all tokens of all answers (Li et al. 2016, arXiv:1510.03055)
    distinct_2: float  # the same for token pairs; falls when answers become alike
    score_std: float | None = None  # standard deviation of the total scores; older records have neither
    component_stds: Mapping[str, float] | None = None  # standard deviation of each raw score
    judge_voids: Mapping[str, int] = field(default_factory=dict)  # scored answers that a judge gave no score, by judge
    judge_void_reasons: Mapping[str, str] = field(default_factory=dict)  # the most frequent one, by judge

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Evaluation:
        known = {key: value for key, value in record.items() if key not in ("time", "journal", "health")}
        return cls(**{**known, "interval": record["interval"] and tuple(record["interval"])})


async def evaluate(
    prompts: Sequence[Prompt],
    generators: Generators,
    reward: Reward,
    reference: Reference | None,
    cfg: EvaluationConfig,
    *,
    policy_version: int,
    max_void_share: float = 1.0,
    answered: Callable[[int, Score | Void], None] = lambda done, score: None,
) -> tuple[Evaluation, list[Answer]]:
    """Asks every prompt once, all at the same time, and waits for the answers. No answer is journalled or trained on.
    `reference` is None if the policy itself is the reference. `answered` is called with the number of answers so far
    and the newest score. Raises UserError if more than `max_void_share` of the answers have no score."""

    done = 0

    async def ask(prompt: Prompt) -> Answered:
        nonlocal done
        found = await answer(prompt, generators, reward.judge, reference)
        done += 1
        answered(done, found.score)
        return found

    answers = await asyncio.gather(*map(ask, prompts))
    check_voids([answer.score for answer in answers], len(answers), max_void_share)
    evaluation = evaluation_of(answers, cfg, policy_version=policy_version)
    return evaluation, [(rollout, score) for rollout, score, _ in answers]


def check_voids(scores: Sequence[Score | Void], asked: int, max_void_share: float) -> None:
    """Raises UserError if more than `max_void_share` of the answers that are asked for have no score."""
    reasons = [score.reason for score in scores if isinstance(score, Void)]
    if len(reasons) > max_void_share * asked:
        raise UserError(
            f"{len(reasons)} of {asked} held-out answers could not be scored, more than reward.max_void_share "
            f"({max_void_share:.0%}); most often: {Counter(reasons).most_common(1)[0][0]}; fix it and try "
            "again, or raise the share"
        )


def evaluation_of(answers: Sequence[Answered], cfg: EvaluationConfig, *, policy_version: int) -> Evaluation:
    """The figures of one answer to each prompt."""
    scored = [(rollout, score, ref) for rollout, score, ref in answers if isinstance(score, Score)]
    scores = [score for _, score, _ in scored]
    voids = [score.reason for _, score, _ in answers if isinstance(score, Void)]
    passed = passes([score for _, score, _ in answers], cfg)
    names = dict.fromkeys(name for score in scores for name in score.components)
    components = {name: [score.components[name] for score in scores if name in score.components] for name in names}
    judge_voids = voids_by_judge(scores)
    responses = [rollout.sampled_ids for rollout, _, _ in scored]
    numbers, given = np.arange(len(scored)), max(1, len(scored))
    written = [messages(rollout) for rollout, _, _ in scored]
    distinct_1, distinct_2 = (distinct(numbers, 0 * numbers, written, n, count=given)["value"] for n in (1, 2))
    return Evaluation(
        policy_version=policy_version,
        prompts=len(answers),
        voids=len(voids),
        void_reason=Counter(voids).most_common(1)[0][0] if voids else "",
        pass_at_1=None if passed is None else sum(passed) / max(1, len(answers)),
        interval=None if passed is None else wilson_interval(sum(passed), len(answers)),
        score=sum(score.total for score in scores) / given,
        components={name: sum(values) / len(values) for name, values in components.items()},
        kl_per_response=sum(float((r.rollout_logprobs - ref).sum()) for r, _, ref in scored) / given,
        response_tokens=sum(map(len, responses)) / given,
        distinct_1=distinct_1,
        distinct_2=distinct_2,
        score_std=float(np.std([score.total for score in scores])) if scores else None,
        component_stds={name: float(np.std(values)) for name, values in components.items()},
        judge_voids={judge: count for judge, (count, _) in judge_voids.items()},
        judge_void_reasons={judge: reason for judge, (_, reason) in judge_voids.items()},
    )


def passes(scores: Sequence[Score | Void], cfg: EvaluationConfig) -> list[bool] | None:
    """Whether each answer passes. An answer that the source did not score does not pass. Returns None if the scores are
    not 0 and 1, and no `evaluation.pass_source` says what passes."""
    given = [score for score in scores if isinstance(score, Score)]
    source = cfg.pass_source or (next(iter(given[0].components)) if given else "")
    if cfg.pass_source is None and not {score.components[source] for score in given} <= {0, 1}:
        return None
    return [isinstance(score, Score) and score.components.get(source, -math.inf) >= cfg.pass_score for score in scores]


def best_version(evaluations: Sequence[Evaluation]) -> int | None:
    """The policy version with the highest mean score, the first one if several have it; None without evaluations."""
    return max(evaluations, key=lambda evaluation: evaluation.score).policy_version if evaluations else None


def win_rate(before: Sequence[float | None], after: Sequence[float | None]) -> float | None:
    """Share of prompts whose answer scores higher after than before; ties count half. A prompt does not count if
    one of its answers has no score (None). Returns None if no prompt counts."""
    both = [(old, new) for old, new in zip(before, after, strict=True) if old is not None and new is not None]
    wins = sum(1.0 if new > old else 0.5 if new == old else 0.0 for old, new in both)
    return wins / len(both) if both else None
