"""RUN/evaluation.json: the figures of every policy, computed from the files on disk. Runs in the driver.

    {"base": "base", "samples": N, "prompts": P, "policies": {"base": {...}, "mine": {...}}}

A figure with an interval is {"value": x, "interval": [low, high]}. One answer of one policy to each prompt also has the
keys of RUN/evaluations.jsonl, next to these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.config.ppo import Config
from common.types import Score, Void
from deploy.evaluation.policies import Asked
from learner.evaluation.answer_figures import figures_of
from learner.evaluation.bootstrap import Bootstrap
from learner.evaluation.crossover import crossover
from learner.evaluation.pass_at_k import pass_at_k, pass_figures
from learner.loop.answers import Answered
from learner.loop.evaluation import evaluation_of, passes

Answers = Sequence[Answered]  # of one policy: the samples of the first prompt, those of the second, ...


def evaluation_record(
    cfg: Config,
    asked: Asked,
    answers: Mapping[str, Answers],
    prompts: int,
    of_texts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of evaluation.json. `answers`: by policy, `asked.samples` of each prompt, in order. `of_texts`: the
    figures of each policy on texts."""
    judges = [judge.name for judge in cfg.evaluation.judges]
    bootstrap = Bootstrap(prompts, seed=cfg.seed)
    estimates = _estimates(cfg, asked, answers, prompts)
    policies = {}
    for name, found in answers.items():
        figures = {"path": asked.paths[name], **answer_figures(found, prompts, bootstrap)}
        compared = answers[asked.base] if asked.base not in (None, name) else None
        figures |= {**figures_of(found, compared, judges, bootstrap), **(of_texts or {}).get(name, {})}
        if estimates is not None:
            figures["pass_at_k"] = pass_figures(estimates[name], bootstrap)
            if asked.base is not None and name != asked.base:
                base, own = estimates[asked.base], estimates[name]
                figures["crossover"] = crossover(base, own, bootstrap)
                figures["crossover_equal"] = crossover(base, own, bootstrap, equal=True)
        policies[name] = figures
    record = {"base": asked.base, "samples": asked.samples, "prompts": prompts, "policies": policies}
    if asked.is_single:
        [(name, found)] = answers.items()
        single = evaluation_of(found, cfg.evaluation, policy_version=0).record()
        record |= {"policy": asked.paths[name], "reference": cfg.model.path, **single}
    return record


def answer_figures(answers: Answers, prompts: int, bootstrap: Bootstrap) -> dict[str, Any]:
    """The figures of one policy's answers that need no other policy and no threshold."""
    scores, components, logratios, tokens, cut = [], [], [], [], []
    for rollout, score, ref_logprobs in answers:
        scores.append(score.total if isinstance(score, Score) else np.nan)
        components.append(score.components if isinstance(score, Score) else {})
        logratios.append(float((rollout.rollout_logprobs - ref_logprobs).sum()))
        tokens.append(len(rollout.response_ids))
        cut.append(rollout.finish_reason == "length")

    def mean(values: Sequence[float]) -> dict[str, Any]:
        """The mean over answers; those without a value (NaN) do not count."""
        table = np.asarray(values, np.float64).reshape(prompts, -1)
        return bootstrap.ratio(np.nansum(table, axis=1), np.isfinite(table).sum(axis=1))

    names = dict.fromkeys(name for one in components for name in one)
    reasons = Counter(score.reason for _, score, _ in answers if isinstance(score, Void))
    return {
        "voids": reasons.total(),
        "void_reason": reasons.most_common(1)[0][0] if reasons else "",
        "score": mean(scores),
        "components": {name: mean([one.get(name, np.nan) for one in components]) for name in names},
        "kl_per_response": mean(logratios),
        "response_tokens": mean(tokens),
        "cut_off": mean(cut),
    }


def _estimates(cfg: Config, asked: Asked, answers: Mapping[str, Answers], prompts: int) -> dict[str, np.ndarray] | None:
    """pass@k of every prompt, [P, N], by policy. None if scores of one of them are not 0 and 1, and no threshold is
    set."""
    passed = passes([answer.score for found in answers.values() for answer in found], cfg.evaluation)
    if passed is None:
        return None
    counts = np.asarray(passed).reshape(len(answers), prompts, asked.samples).sum(axis=2)
    return {name: pass_at_k(counts[number], asked.samples) for number, name in enumerate(answers)}
