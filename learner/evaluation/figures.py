"""Figures of an evaluation that are functions of sums over prompts, with their intervals. Runs in the driver; no torch.

A mean over answers is a sum divided by a number of answers, and a correlation needs five sums. So a resample needs only
the sums of each prompt, and how often each prompt was drawn. The windows of a text take the place of prompts in its
perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from learner.evaluation.bootstrap import Bootstrap, Figure, interval
from learner.evaluation.shares import share


def sums_by_prompt(prompts: np.ndarray, count: int, *columns: np.ndarray) -> np.ndarray:
    """The sum of each column over the items of each prompt, float64 [P, columns]. prompts [n]: the prompt of each item,
    from 0 to `count` - 1."""
    return np.stack([np.bincount(prompts, np.asarray(c, np.float64), count) for c in columns], axis=1)


def figures(
    sums: np.ndarray, bootstrap: Bootstrap, of: Callable[[np.ndarray], np.ndarray], given: np.ndarray
) -> list[Figure]:
    """Figures of prompts with sums [P, K]. `of` maps the means of these sums over prompts, [..., K], to figures, [...,
    M]. Its result must not change if all sums have a common factor. It returns nan for an undefined figure; such
    resamples do not count. given [P, M] or [P, 1]: above 0 for the prompts that a figure is computed from. If there is
    only one such prompt, the figure has no interval."""
    values = of(sums.mean(0))
    numbers = np.broadcast_to((given > 0).sum(0), values.shape).tolist()
    drawn = of(bootstrap.means(sums)) if max(numbers) > 1 else np.zeros((0, len(values)))
    return [_figure(float(value), *rest) for value, *rest in zip(values, drawn.T, numbers, strict=True)]


def mean(prompts: np.ndarray, values: np.ndarray, bootstrap: Bootstrap, *, counts: np.ndarray | None = None) -> Figure:
    """The sum of the values divided by the sum of the counts (left out: 1 for each value)."""
    counts = np.ones(len(values)) if counts is None else counts
    sums = sums_by_prompt(prompts, bootstrap.prompts, values, counts)
    [figure] = figures(sums, bootstrap, ratio, sums[:, 1:])
    return figure


def mean_score(prompts: np.ndarray, scores: np.ndarray, bootstrap: Bootstrap) -> Figure:
    """The mean over answers of scores, which are often 0 and 1, or between them."""
    if ((scores >= 0) & (scores <= 1)).all():
        return share(*sums_by_prompt(prompts, bootstrap.prompts, scores, np.ones(len(scores))).T)
    return mean(prompts, scores, bootstrap)


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first half of the columns divided by the second half: [..., 2 M] to [..., M]."""
    tops, bottoms = np.split(sums, 2, axis=-1)
    return np.divide(tops, bottoms, out=np.full_like(tops, np.nan), where=bottoms != 0)


def jackknife(value: float, without: np.ndarray) -> Figure:
    """The interval from `without` [P], the figure computed without each prompt in turn: 1.96 standard errors to each
    side. For figures that a bootstrap distorts, such as numbers of different items: a prompt that is drawn twice adds
    nothing new. The variance is on average too large rather than too small (Efron and Stein 1981). The figure is a
    share, so the interval ends at 0 and 1."""
    if len(without) < 2:
        return {"value": value, "interval": None}
    spread = 1.96 * math.sqrt((len(without) - 1) * without.var())
    return {"value": value, "interval": [max(0.0, value - spread), min(1.0, value + spread)]}


def rose(change: Figure) -> bool:
    """The whole interval of a change is above 0."""
    return change["interval"] is not None and change["interval"][0] > 0


def fell(change: Figure) -> bool:
    """The whole interval of a change is below 0."""
    return change["interval"] is not None and change["interval"][1] < 0


def _figure(value: float, drawn: np.ndarray, prompts: int) -> Figure:
    known = drawn[np.isfinite(drawn)]
    has_interval = prompts > 1 and len(known) > 0
    return {
        "value": value if math.isfinite(value) else None,
        "interval": interval(known, prompts) if has_interval else None,
    }
