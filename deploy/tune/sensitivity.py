"""How much each key of a search mattered for the outcome of its trials. Runs anywhere; pure numbers.

Each key is judged alone. For a key with choices, the fit is the mean outcome of each value. For a range, it is a
parabola in the value, or in its logarithm for a logarithmic range. With few trials it is a line. `explained` is
adjusted R2 (Ezekiel 1930), which is near 0 for a key without any effect. Plain R2 would be far above 0 with few trials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.student import student_quantile
from learner.evaluation.bootstrap import interval

RESAMPLES = 1000  # of the bootstrap, and permutations
SIGNIFICANCE = 0.05
FEWEST = 4  # trials: with fewer no interval means anything
PARABOLA = 8  # fewest trials for a parabola, which has three coefficients; with fewer, a range gets a line


@dataclass(frozen=True)
class Column:
    """A key's value in every trial: the number of a choice, or the place on the scale of a range."""

    key: str
    values: tuple[float, ...]
    choices: tuple[Any, ...] | None = None  # None: a range
    log: bool = False


@dataclass(frozen=True)
class Effect:
    """What one key did to the outcome."""

    key: str
    explained: float  # share of the variance of the outcome
    explained_interval: list[float]
    p: float  # how often a key without any effect explains at least this much (permutation test)
    smallest_p: float  # the p that a key would have in these trials if it explained everything
    slope: float | None  # of a range: change of the outcome for each factor of 10 (log) or each unit; None: one value
    slope_interval: list[float] | None
    means: tuple[dict[str, Any], ...] | None  # of choices: value, number of trials, mean outcome and its interval
    best: Any  # the choice with the best mean; the place on the scale of a range at which the curve is highest

    @property
    def mattered(self) -> bool:
        return self.p <= SIGNIFICANCE

    @property
    def can_tell(self) -> bool:
        """False if no outcome of these trials could show that the key matters: there are too few."""
        return self.smallest_p <= SIGNIFICANCE


def effect_of(column: Column, outcomes: Sequence[float], *, seed: int = 0) -> Effect:
    """The effect of one key. Intervals are percentiles of a bootstrap over trials (Efron 1979), except those of the
    means of choices."""
    rng = np.random.default_rng(seed)
    x, y = np.array(column.values, float), np.array(outcomes, float)
    curve = _choices if column.choices is not None else _parabola if len(y) >= PARABOLA else _line
    drawn = rng.integers(len(y), size=(RESAMPLES, len(y)))
    explained = [_adjusted(curve(x[rows]), y[rows], trials=len(set(rows.tolist()))) for rows in drawn]
    slope = slope_interval = means = None
    if column.choices is None:
        best: Any = _highest(curve(x), x, y)
        if np.ptp(x) > 0:
            slope = _slope(x, y)
            slopes = [_slope(x[rows], y[rows]) for rows in drawn if np.ptp(x[rows]) > 0]
            slope_interval = interval(np.array(slopes), len(y))
    else:
        means = tuple(_mean_of(column.choices[int(value)], y[x == value]) for value in sorted(set(x.tolist())))
        best = max(means, key=lambda mean: mean["mean"])["value"]
    return Effect(
        key=column.key,
        explained=_adjusted(curve(x), y, trials=len(y)),
        explained_interval=interval(np.array(explained)),
        p=_p(curve(x), y, rng),
        smallest_p=_p(curve(x), x, rng),
        slope=slope,
        slope_interval=slope_interval,
        means=means,
        best=best,
    )


def _choices(x: np.ndarray) -> np.ndarray:
    """One column for each value that occurs: the fit is the mean outcome of each."""
    return (x[:, None] == np.unique(x)[None, :]).astype(float)


def _line(x: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(x), _centred(x)], axis=1)


def _parabola(x: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(x), _centred(x), _centred(x) ** 2], axis=1)


def _centred(x: np.ndarray) -> np.ndarray:
    width = np.ptp(x)
    return (x - x.mean()) / width if width > 0 else np.zeros_like(x)


def _r2(design: np.ndarray, y: np.ndarray) -> float:
    """Share of the variance that the least-squares fit explains; 0 without any variance."""
    total = float(((y - y.mean()) ** 2).sum())
    if total <= 1e-24:
        return 0.0
    fit = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return max(0.0, 1 - float(((y - fit) ** 2).sum()) / total)


def _adjusted(design: np.ndarray, y: np.ndarray, *, trials: int) -> float:
    """R2 adjusted for the coefficients of the fit, never below 0. `trials`: number of different trials, because a trial
    that a resample repeats is not new evidence."""
    coefficients = int(np.linalg.matrix_rank(design))
    if trials <= coefficients:
        return 0.0
    return max(0.0, 1 - (1 - _r2(design, y)) * (trials - 1) / (trials - coefficients))


def _p(design: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    """How often the fit explains at least as much if the outcomes are shuffled. The real order counts as one of the
    orders."""
    basis, sizes, _ = np.linalg.svd(design, full_matrices=False)
    basis = basis[:, sizes > 1e-9 * sizes[0]]
    orders = np.stack([y, *(rng.permutation(y) for _ in range(RESAMPLES))])
    explained = ((orders @ basis) ** 2).sum(axis=1)  # squared length of the fit, which orders like R2
    return float(np.mean(explained >= explained[0] - 1e-9 * (y @ y)))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """The slope of the least-squares line."""
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def _highest(design: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """The place of the trial where the curve is highest. Places between and beyond the trials are not considered."""
    return float(x[np.argmax(design @ np.linalg.lstsq(design, y, rcond=None)[0])])


def _mean_of(value: Any, y: np.ndarray) -> dict[str, Any]:
    """The mean outcome of a value, with Student's t interval: a bootstrap of two to four trials would be far too
    short."""
    known = None
    if len(y) > 1:
        reach = student_quantile(0.975, len(y) - 1) * float(y.std(ddof=1)) / math.sqrt(len(y))
        known = [float(y.mean()) - reach, float(y.mean()) + reach]
    return {"value": value, "trials": len(y), "mean": float(y.mean()), "interval": known}
