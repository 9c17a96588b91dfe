"""How well a critic predicts: pure functions that compare its values with the realised returns.

Runs in every learner rank, in the trainers of a critic and in the driver, for the report. values, returns and mask are
[B, R]: the critic's prediction for each token, and what really followed (`returns_to_go`: the rewards from that token
on, discounted by gamma, without a bootstrap). Padding may hold anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QUARTERS = 4


class Bin(NamedTuple):
    """Tokens whose predicted values are close to each other."""

    predicted: float  # mean value
    realised: float  # mean return
    tokens: int


def critic_quality(values: Tensor, returns: Tensor, scores: Tensor, mask: Tensor) -> dict[str, float]:
    """The figures of a batch by metric key. scores [B]: as the learner saw them, normalised."""
    parts = {"realised": mask, **_positions(mask)}
    explained = {name: explained_variance(values, returns, part) for name, part in parts.items()}
    return {
        "value/returns_var/realised": _variance(returns[mask].double()),
        **{f"value/explained_variance/{name}": share for name, share in explained.items()},
        "value/calibration_error": calibration_error(calibration(values, returns, mask)),
        "value/score_correlation": correlation(values[parts["first"]], scores[mask.any(1)]),
    }


def _positions(mask: Tensor) -> dict[str, Tensor]:
    """Masks [B, R] of the parts of a response.

    Token t of n, counted from 0, is in quarter floor(4 t / n) + 1: a quarter has the tokens that begin in it. So the
    token of a response of one is in quarter 1, two are in 1 and 3, three are in 1, 2 and 3.
    """
    lengths = mask.sum(1, keepdim=True)
    token = mask.cumsum(1) - 1
    quarter = token * QUARTERS // lengths.clamp(min=1)
    quarters = {f"quarter_{number + 1}": quarter == number for number in range(QUARTERS)}
    parts = {"first": token == 0, **quarters, "last": token == lengths - 1}
    return {name: mask & part for name, part in parts.items()}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the True places. 1: perfect; 0: no better than a constant, or the
    returns do not vary; below 0: worse than a constant."""
    values, returns = values[mask].double(), returns[mask].double()
    variance = _variance(returns)
    return 1 - _variance(returns - values) / variance if variance else 0.0


def calibration(values: Tensor, returns: Tensor, mask: Tensor, bins: int = 10) -> list[Bin]:
    """The tokens in order of their predicted value, cut into `bins` bins whose counts differ by 1 at most. Fewer tokens
    than bins: one bin for each token.

    Tokens with equal predictions count with their mean return. Otherwise their order would decide which bin gets which
    return, and a critic that predicts a constant would look badly calibrated.
    """
    predicted, group, members = values[mask].double().unique(return_inverse=True, return_counts=True)
    realised = torch.zeros_like(predicted).index_add_(0, group, returns[mask].double()) / members
    parts = [x.repeat_interleave(members).tensor_split(bins) for x in (predicted, realised)]
    return [Bin(p.mean().item(), r.mean().item(), len(p)) for p, r in zip(*parts, strict=True) if len(p)]


def calibration_error(bins: list[Bin]) -> float:
    """Mean distance between predicted and realised return, over the tokens of the bins."""
    return sum(b.tokens * abs(b.predicted - b.realised) for b in bins) / max(1, sum(b.tokens for b in bins))


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two vectors; 0 if one of them does not vary."""
    x, y = x.double(), y.double()
    if not (product := _variance(x) * _variance(y)):
        return 0.0
    return max(-1.0, min(1.0, ((x - x.mean()) * (y - y.mean())).mean().item() / product**0.5))


def _variance(x: Tensor) -> float:
    """Population variance of a float64 vector. 0 where it is only rounding of the numbers, or there are none."""
    if not len(x):
        return 0.0
    variance = x.var(correction=0).item()
    return variance if variance > 1e-12 * (x**2).mean().item() else 0.0
