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


def sums_by_prompt(prompts: np.ndarray, count: int, *columns: np.ndarray) -> np.ndarray:
    """The sum of each column over the items of each prompt, float64 [P, columns]. prompts [n]: the prompt of each item,
    from 0 to `count` - 1."""
    return np.stack([np.bincount(prompts, np.asarray(c, np.float64), count) for c in columns], axis=1)


def figures(sums: np.ndarray, bootstrap: Bootstrap, of: Callable[[np.ndarray], np.ndarray]) -> list[Figure]:
    """Figures of prompts with sums [P, K]. `of` maps means of sums over prompts, [..., K], to figures, [..., M]. It
    must not depend on their scale, and gives nan where there is no figure; such resamples do not count."""
    values = of(sums.mean(0))
    if bootstrap.prompts < 2:  # all resamples are the same
        return [_figure(float(value), values[:0]) for value in values]
    drawn = of(bootstrap.means(sums))
    return [_figure(float(value), column) for value, column in zip(values, drawn.T, strict=True)]


def mean(prompts: np.ndarray, values: np.ndarray, bootstrap: Bootstrap, *, counts: np.ndarray | None = None) -> Figure:
    """The sum of the values divided by the sum of the counts (left out: 1 for each value)."""
    counts = np.ones(len(values)) if counts is None else counts
    [figure] = figures(sums_by_prompt(prompts, bootstrap.prompts, values, counts), bootstrap, ratio)
    return figure


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first half of the columns divided by the second half: [..., 2 M] to [..., M]."""
    tops, bottoms = np.split(sums, 2, axis=-1)
    return np.divide(tops, bottoms, out=np.full_like(tops, np.nan), where=bottoms != 0)


def jackknife(value: float, without: np.ndarray) -> Figure:
    """The interval from `without` [P], the figure computed without each prompt in turn: 1.96 standard errors to each
    side. For figures that a bootstrap distorts, such as numbers of different items: a prompt that is drawn twice adds
    nothing new. The variance is on average too large rather than too small (Efron and Stein 1981)."""
    if len(without) < 2:
        return {"value": value, "interval": None}
    spread = 1.96 * math.sqrt((len(without) - 1) * without.var())
    return {"value": value, "interval": [value - spread, value + spread]}


def rose(change: Figure) -> bool:
    """The whole interval of a change is above 0."""
    return change["interval"] is not None and change["interval"][0] > 0


def fell(change: Figure) -> bool:
    """The whole interval of a change is below 0."""
    return change["interval"] is not None and change["interval"][1] < 0


def _figure(value: float, drawn: np.ndarray) -> Figure:
    known = drawn[np.isfinite(drawn)]
    return {"value": value if math.isfinite(value) else None, "interval": interval(known) if len(known) else None}
