"""RUN/evaluation.json: the figures of every policy, computed from the files on disk. Runs in the driver.

    {"base": "base", "samples": N, "prompts": P, "policies": {"base": {...}, "mine": {...}}}

A figure with an interval is {"value": x, "interval": [low, high]}. One answer of one policy to each prompt also has the
keys of RUN/evaluations.jsonl, next to these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.config.ppo import Config
from deploy.evaluation.policies import EvaluationPlan
from learner.evaluation.answer_figures import figures_of
from learner.evaluation.bootstrap import Bootstrap
from learner.evaluation.crossover import crossover
from learner.evaluation.pass_at_k import pass_at_k, pass_figures
from learner.loop.answers import Answered
from learner.loop.evaluation import evaluation_of, passes

Answers = Sequence[Answered]  # of one policy: all samples of the first prompt, then all samples of the second, ...


def evaluation_record(
    cfg: Config,
    plan: EvaluationPlan,
    answers: Mapping[str, Answers],
    prompts: int,
    of_texts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of evaluation.json. `answers`: by policy, `plan.samples` of each prompt, in order. `of_texts`: the
    figures of each policy on texts."""
    judges = [judge.name for judge in cfg.evaluation.judges]
    bootstrap = Bootstrap(prompts, seed=cfg.seed)
    estimates = _estimates(cfg, plan, answers, prompts)
    policies = {}
    for name, found in answers.items():
        compared = answers[plan.base] if plan.base not in (None, name) else None
        figures = {"path": plan.paths[name], **figures_of(found, compared, judges, bootstrap)}
        figures |= (of_texts or {}).get(name, {})
        if estimates is not None:
            figures["pass_at_k"] = pass_figures(estimates[name])
            if plan.base is not None and name != plan.base:
                base, own = estimates[plan.base], estimates[name]
                figures["crossover"] = crossover(base, own, bootstrap)
                figures["crossover_equal"] = crossover(base, own, bootstrap, equal=True)
        policies[name] = figures
    record = {"base": plan.base, "samples": plan.samples, "prompts": prompts, "policies": policies}
    if plan.is_single:
        [(name, found)] = answers.items()
        single = evaluation_of(found, cfg.evaluation, policy_version=0).record()
        record |= {"policy": plan.paths[name], "reference": cfg.model.path, **single}
    return record


def _estimates(
    cfg: Config, plan: EvaluationPlan, answers: Mapping[str, Answers], prompts: int
) -> dict[str, np.ndarray] | None:
    """pass@k of every prompt, [P, N], by policy. None if no threshold is set, and some scores are neither 0 nor 1."""
    passed = passes([answer.score for found in answers.values() for answer in found], cfg.evaluation)
    if passed is None:
        return None
    counts = np.asarray(passed).reshape(len(answers), prompts, plan.samples).sum(axis=2)
    return {name: pass_at_k(counts[number], plan.samples) for number, name in enumerate(answers)}
