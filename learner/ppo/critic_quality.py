"""How well a critic predicts: pure functions that compare its values with the realised returns.

Runs in every learner rank, in the trainers of a critic, and in the driver for the report. The report imports no torch,
so these functions take arrays as well as CPU tensors. values, returns and mask are [B, R]: the critic's prediction for
each token, and what really followed (the rewards from that token on, discounted by gamma, without a bootstrap). Padding
may hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

QUARTERS = 4
# The parts of a response by their name in value/explained_variance/NAME, and the name that people read.
PARTS = {
    "realised": "all tokens",
    "first": "first token",
    "quarter_1": "quarter 1",
    "quarter_2": "quarter 2",
    "quarter_3": "quarter 3",
    "quarter_4": "quarter 4",
    "last": "last token",
}
POSITIONS = tuple(PARTS)[1:]


class Bin(NamedTuple):
    """Tokens whose predicted values are close to each other."""

    predicted: float  # mean value
    realised: float  # mean return
    tokens: int


def critic_quality(values: ArrayLike, returns: ArrayLike, scores: ArrayLike, mask: ArrayLike) -> dict[str, float]:
    """The figures of a batch by metric key. scores [B]: as the learner saw them, normalised."""
    values, returns, scores, mask = (np.asarray(x) for x in (values, returns, scores, mask))
    parts = {name: part[mask] for name, part in positions(mask).items()}
    return quality_of_tokens(values[mask], returns[mask], parts, scores[mask.any(1)])


def quality_of_tokens(
    values: np.ndarray, returns: np.ndarray, parts: Mapping[str, np.ndarray], scores: np.ndarray
) -> dict[str, float]:
    """The same for tokens without padding, one response after another. values, returns, and each of the parts that
    `positions` names: [n]. scores: of the responses that have tokens."""
    parts = {"realised": np.ones(len(values), bool), **parts}
    explained = {name: explained_variance(values, returns, part) for name, part in parts.items()}
    return {
        "value/returns_var/realised": _variance(returns.astype(np.float64)),
        **{f"value/explained_variance/{name}": share for name, share in explained.items()},
        "value/calibration_error": calibration_error(calibration(values, returns, parts["realised"])),
        "value/score_correlation": correlation(values[parts["first"]], scores),
    }


def positions(mask: np.ndarray) -> dict[str, np.ndarray]:
    """Masks [B, R] of the parts of a response.

    Token t of n, counted from 0, is in quarter floor(4 t / n) + 1: a quarter has the tokens that begin in it. So a
    single token is in quarter 1, two tokens are in quarters 1 and 3, three in 1, 2 and 3.
    """
    lengths = mask.sum(1, keepdims=True)
    token = mask.cumsum(1) - 1
    quarter = token * QUARTERS // np.maximum(lengths, 1)
    parts = [token == 0, *(quarter == number for number in range(QUARTERS)), token == lengths - 1]
    return {name: mask & part for name, part in zip(POSITIONS, parts, strict=True)}


def realised_returns(rewards: np.ndarray, ends: np.ndarray, lengths: np.ndarray, *, gamma: float) -> np.ndarray:
    """The discounted sum of the rewards from each token to the end of its sequence, float64. One response follows
    another: rewards and ends [tokens of all], lengths [B]. `ends` is True on the last token of each sequence. For
    files; `returns_to_go` does the same with padded tensors."""
    mask = np.arange(lengths.max(initial=0))[:, None] < lengths  # tokens first: the loop takes whole rows
    padded, goes_on = np.zeros(mask.shape), np.zeros(mask.shape, bool)
    padded.T[mask.T], goes_on.T[mask.T] = rewards, ~ends
    for t in range(len(padded) - 2, -1, -1):
        padded[t] += np.where(goes_on[t], gamma * padded[t + 1], 0.0)
    return padded.T[mask.T]


def explained_variance(values: ArrayLike, returns: ArrayLike, mask: ArrayLike) -> float:
    """1 - Var(returns - values) / Var(returns) over the True places. 1: perfect; 0: no better than a constant, or the
    returns do not vary; below 0: worse than a constant."""
    values, returns = _chosen(values, mask), _chosen(returns, mask)
    variance = _variance(returns)
    return 1 - _variance(returns - values) / variance if variance else 0.0


def calibration(values: ArrayLike, returns: ArrayLike, mask: ArrayLike, bins: int = 10) -> list[Bin]:
    """The tokens in order of their predicted value, cut into `bins` bins whose sizes differ by 1 at most. Fewer tokens
    than bins: one bin for each token.

    Tokens whose predictions are equal up to rounding count with their mean return. Otherwise their order would decide
    which bin gets which return, and a critic that predicts a constant would look badly calibrated.
    """
    values, returns = _chosen(values, mask), _chosen(returns, mask)
    unit = 1e-5 * np.abs(values).max(initial=0.0) or 1.0
    _, group, members = np.unique(np.round(values / unit), return_inverse=True, return_counts=True)
    means = [np.bincount(group, x, len(members)) / members for x in (values, returns)]
    parts = [np.array_split(mean.repeat(members), bins) for mean in means]
    return [Bin(float(p.mean()), float(r.mean()), len(p)) for p, r in zip(*parts, strict=True) if len(p)]


def calibration_error(bins: list[Bin]) -> float:
    """Mean distance between predicted and realised return, over the tokens of the bins."""
    return sum(b.tokens * abs(b.predicted - b.realised) for b in bins) / max(1, sum(b.tokens for b in bins))


def correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation of two vectors; 0 if one of them does not vary."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not (product := _variance(x) * _variance(y)):
        return 0.0
    return float(np.clip(((x - x.mean()) * (y - y.mean())).mean() / product**0.5, -1, 1))


def _chosen(x: ArrayLike, mask: ArrayLike) -> np.ndarray:
    """The items [n] at the True places, float64."""
    return np.asarray(x)[np.asarray(mask)].astype(np.float64)


def _variance(x: np.ndarray) -> float:
    """Population variance of a float64 vector. 0 where it is only rounding of the numbers, or there are none."""
    if not len(x):
        return 0.0
    variance = float(x.var())
    return variance if variance > 1e-12 * float((x**2).mean()) else 0.0
