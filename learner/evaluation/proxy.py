"""The training reward next to the judges that training never sees. Runs in the driver; no torch.

The training reward is only a proxy. A policy that is trained for too long finds answers that the proxy likes and the
judges do not (Gao et al. 2023, arXiv:2210.10760).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from learner.evaluation.bootstrap import Bootstrap, Figure
from learner.evaluation.figures import fell, figures, mean_score, ratio, rose, sums_by_prompt


@dataclass(frozen=True)
class JudgedAnswers:
    """The scores of a policy's answers. Answers without a score are left out."""

    prompts: np.ndarray  # int64 [A], the prompt of each answer, from 0
    proxy: np.ndarray  # float64 [A], the total score that training maximises
    judges: Mapping[str, np.ndarray]  # float64 [A] by name; nan: this judge gave the answer no score

    def scored_by(self, judge: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Prompt, score of the proxy and score of the judge, for the answers that the judge scored."""
        scores = self.judges[judge]
        known = ~np.isnan(scores)
        return self.prompts[known], self.proxy[known], scores[known]


def proxy_record(answers: JudgedAnswers, base: JudgedAnswers | None, bootstrap: Bootstrap) -> dict[str, Any]:
    """The mean score of the proxy and of every judge. Each judge also has the number of answers that it scored, and its
    correlation with the proxy over these answers. `base`: the answers of the base to the same prompts. With it, the
    record also has the changes, and whether the proxy rose while the judge fell (each whole interval beyond 0)."""
    proxy: dict[str, Any] = {"score": mean_score(answers.prompts, answers.proxy, bootstrap)}
    if base is not None:
        proxy["change"] = change(answers.prompts, answers.proxy, base.prompts, base.proxy, bootstrap)
    judges = {}
    for name in answers.judges:
        prompts, own_proxy, scores = answers.scored_by(name)
        found: dict[str, Any] = {
            "answers": len(scores),
            "score": mean_score(prompts, scores, bootstrap),
            "correlation": correlation(prompts, own_proxy, scores, bootstrap),
        }
        if base is not None:
            base_prompts, _, base_scores = base.scored_by(name)
            found["change"] = change(prompts, scores, base_prompts, base_scores, bootstrap)
            found["proxy_rose_judge_fell"] = rose(proxy["change"]) and fell(found["change"])
        judges[name] = found
    return {"proxy": proxy, "judges": judges}


def change(
    prompts: np.ndarray, scores: np.ndarray, base_prompts: np.ndarray, base_scores: np.ndarray, bootstrap: Bootstrap
) -> Figure:
    """The mean score minus that of the base. A resample takes a prompt with the answers of both."""
    own, base = (
        sums_by_prompt(where, bootstrap.prompts, given, np.ones(len(given)))
        for where, given in ((prompts, scores), (base_prompts, base_scores))
    )
    columns = np.concatenate([own, base], axis=1)[:, [0, 2, 1, 3]]
    given = columns[:, 2:].max(1, keepdims=True)
    [figure] = figures(columns, bootstrap, lambda sums: -np.diff(ratio(sums), axis=-1), given)
    return figure


def correlation(prompts: np.ndarray, x: np.ndarray, y: np.ndarray, bootstrap: Bootstrap) -> Figure:
    """Pearson's correlation over answers. None if one of them does not vary."""
    if len(x):
        x, y = x - x.mean(), y - y.mean()  # without this, the sums of squares would lose significant digits
    sums = sums_by_prompt(prompts, bootstrap.prompts, np.ones(len(x)), x, y, x * x, y * y, x * y)
    [figure] = figures(sums, bootstrap, _correlation, sums[:, :1])
    return figure


def _correlation(sums: np.ndarray) -> np.ndarray:
    """From the sums of 1, x, y, x^2, y^2 and xy, [..., 6], to [..., 1]."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    # n^2 times the variances. Below the bounds they are rounding.
    var_x, var_y = n * xx - x * x, n * yy - y * y
    vary = (var_x > 1e-12 * n * xx) & (var_y > 1e-12 * n * yy)
    found = np.divide(n * xy - x * y, np.sqrt(np.abs(var_x * var_y)), out=np.full_like(n, np.nan), where=vary)
    return np.clip(found, -1, 1)[..., None]
