"""All figures of one policy's answers that need no threshold: scores, lengths, KL, diversity, judges.

Runs in the driver; no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.types import FINISHED, Rollout, Score, Void
from learner.evaluation.bootstrap import Bootstrap
from learner.evaluation.diversity import NGRAMS, different_answers, distinct, entropy, messages
from learner.evaluation.figures import mean, mean_score
from learner.evaluation.forgetting import kl_by_position
from learner.evaluation.proxy import JudgedAnswers, proxy_record
from learner.loop.answers import Answered
from learner.loop.judges import voids_by_judge


@dataclass(frozen=True)
class ScoredAnswers:
    """The answers that have a score. The log-probabilities of the others may be missing."""

    rollouts: Sequence[Rollout]
    scores: Sequence[Score]
    ref_logprobs: Sequence[np.ndarray]

    @classmethod
    def of(cls, answers: Sequence[Answered]) -> ScoredAnswers:
        scored = [answer for answer in answers if isinstance(answer.score, Score)]
        scores = [answer.score for answer in scored if isinstance(answer.score, Score)]
        return cls([a.rollout for a in scored], scores, [a.ref_logprobs for a in scored])

    @property
    def prompts(self) -> np.ndarray:
        """The prompt of each answer, int64 [A]."""
        return np.array([rollout.prompt.sample_id.prompt for rollout in self.rollouts], dtype=np.int64)

    @property
    def samples(self) -> np.ndarray:
        """The number of each answer among those to its prompt, int64 [A]."""
        return np.array([rollout.prompt.sample_id.replica for rollout in self.rollouts], dtype=np.int64)

    def judged(self, judges: Sequence[str]) -> JudgedAnswers:
        """Total scores, and those of the judges by name."""
        by_judge = {
            name: np.array([score.components.get(name, np.nan) for score in self.scores], np.float64) for name in judges
        }
        return JudgedAnswers(self.prompts, np.array([score.total for score in self.scores]), by_judge)


def figures_of(
    answers: Sequence[Answered], base: Sequence[Answered] | None, judges: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Any]:
    """The figures of a policy, by their name in evaluation.json. `base`: the answers of the base to the same prompts;
    None for the base itself, or if it is not evaluated. Answers without a score count in `voids` alone."""
    reasons = Counter(answer.score.reason for answer in answers if isinstance(answer.score, Void))
    found = ScoredAnswers.of(answers)
    compared = None if base is None else ScoredAnswers.of(base).judged(judges)
    figures = proxy_record(found.judged(judges), compared, bootstrap)
    judge_voids = voids_by_judge(found.scores)
    for judge, of_judge in figures["judges"].items():
        of_judge["voids"], of_judge["void_reason"] = judge_voids.get(judge, (0, ""))
    return {
        "voids": reasons.total(),
        "void_reason": reasons.most_common(1)[0][0] if reasons else "",
        **_score_figures(found, bootstrap),
        **_token_figures(found, bootstrap),
        **figures,
    }


def _score_figures(found: ScoredAnswers, bootstrap: Bootstrap) -> dict[str, Any]:
    """The means of the total score, and of the raw score of each source and judge."""
    components = {}
    for name in dict.fromkeys(name for score in found.scores for name in score.components):
        known = np.array([name in score.components for score in found.scores])
        scores = np.array([score.components[name] for score in found.scores if name in score.components])
        components[name] = mean_score(found.prompts[known], scores, bootstrap)
    totals = np.array([score.total for score in found.scores])
    return {"score": mean_score(found.prompts, totals, bootstrap), "components": components}


def _token_figures(found: ScoredAnswers, bootstrap: Bootstrap) -> dict[str, Any]:
    """Length, KL and diversity."""
    prompts, responses = found.prompts, [rollout.sampled_ids for rollout in found.rollouts]
    logprobs = [rollout.rollout_logprobs for rollout in found.rollouts]
    kl = [own - ref for own, ref in zip(logprobs, found.ref_logprobs, strict=True)]
    cut = np.array([rollout.finish_reason not in FINISHED for rollout in found.rollouts], dtype=np.float64)
    figures = {
        "kl_per_response": mean(prompts, np.array([float(tokens.sum()) for tokens in kl]), bootstrap),
        "response_tokens": mean(prompts, np.array([len(ids) for ids in responses]), bootstrap),
        "cut_off": mean_score(prompts, cut, bootstrap),
        "entropy": entropy(prompts, logprobs, bootstrap),
    }
    written = [messages(rollout) for rollout in found.rollouts]
    for n in NGRAMS:
        figures[f"distinct_{n}"] = distinct(prompts, found.samples, written, n, count=bootstrap.prompts)
    if (different := different_answers(prompts, responses)) is not None:
        figures["different_answers"] = different
    return {**figures, "kl_by_position": kl_by_position(prompts, kl, bootstrap)}
