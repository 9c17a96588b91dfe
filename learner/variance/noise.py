"""How noisy a policy gradient is, from the gradients of M equal parts of a batch: pure functions of inner products.

Runs in every rank of the variance account. `products` is float64 [M, M]: the inner products of the parts' gradients,
which are scaled so that their mean is the gradient of the batch. With D the mean of the diagonal and O the mean of all
other entries:

    |mean|^2 = (D + (M - 1) O) / M           of the gradient that PPO would use
    trace    = (D - O) / M                   unbiased: of the covariance matrix of that mean
    signal   = |mean|^2 - trace = O          unbiased: |g|^2 of the gradient of infinitely many responses

Intervals are jackknife intervals, from every figure without each of the parts in turn (Efron and Tibshirani 1993,
chapter 11).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from common.student import student_quantile

CONFIDENCE = 0.95


class Moments(NamedTuple):
    """The moments of one batch, or arrays of those of several."""

    squared_norm: Any  # |mean|^2
    trace: Any

    @property
    def relative(self) -> Any:
        """trace / |mean|^2: the square of the relative standard error. NaN for a gradient of zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(self.trace, self.squared_norm)


def moments(products: np.ndarray) -> Moments:
    """The moments of the whole batch."""
    count, total, diagonal = len(products), products.sum(), np.trace(products)
    others = (total - diagonal) / (count * (count - 1))
    return Moments(total / count**2, (diagonal / count - others) / count)


def without_each(products: np.ndarray) -> Moments:
    """The same, [M], of the batches that lack one part."""
    count = len(products) - 1
    diagonal = np.trace(products) - np.diag(products)
    total = products.sum() - products.sum(0) - products.sum(1) + np.diag(products)
    others = (total - diagonal) / (count * (count - 1))
    return Moments(total / count**2, (diagonal / count - others) / count)


def noise(products: np.ndarray, responses: int) -> dict[str, Any]:
    """The figures of one estimator. `responses`: those of the batch.

    The relative standard error is sqrt(trace) / |mean|. The noise scale (McCandlish et al. 2018, arXiv:1812.06162,
    "simple noise scale") is the number of responses at which the standard error would equal the norm of the true
    gradient: responses * trace / signal. It is None where no signal is seen, and its upper end is None where the
    interval contains that case.
    """
    whole = moments(products)
    found: dict[str, Any] = {
        "gradient_norm": math.sqrt(max(0.0, whole.squared_norm)),
        "standard_error": math.sqrt(max(0.0, whole.trace)),
        "signal": whole.squared_norm - whole.trace,
        "relative_standard_error": None,
        "noise_scale": None,
    }
    if not (whole.squared_norm > 0 and whole.trace > 0):
        return found
    logs = _interval(np.log(whole.relative), _logs(without_each(products).relative))
    ends = None if logs is None else [math.exp(log) for log in logs]
    found["relative_standard_error"] = _figure(math.sqrt(whole.relative), ends and [math.sqrt(end) for end in ends])
    if whole.relative < 1:
        scales = None if ends is None else [responses * _odds(end) if end < 1 else None for end in ends]
        found["noise_scale"] = _figure(responses * _odds(whole.relative), scales)
    return found


def noise_against(products: np.ndarray, others: np.ndarray) -> dict[str, Any] | None:
    """The noise scale of one estimator divided by that of another on the same parts: 0.5 says that half as many
    responses give the same precision. None where either has no signal; the interval is None where it would contain
    that case. The parts are the same, so the noise that both share cancels."""
    pair = [products, others]
    whole = [moments(one).relative for one in pair]
    if not all(0 < relative < 1 for relative in whole):
        return None
    value = _odds(whole[0]) / _odds(whole[1])
    without = [without_each(one).relative for one in pair]
    if not all(((relative > 0) & (relative < 1)).all() for relative in without):
        return _figure(value, None)
    logs = np.log(_odds(without[0])) - np.log(_odds(without[1]))
    ends = _interval(math.log(value), logs)
    return _figure(value, ends and [math.exp(end) for end in ends])


def direction(products: np.ndarray, others: np.ndarray, between: np.ndarray) -> dict[str, Any] | None:
    """The cosine between the true gradients of two estimators. `between` [M, M]: the inner products of the parts of the
    one with those of the other. Products of a part with itself are left out, so that noise does not make the cosine
    smaller. None where either has no signal."""

    def cosine(keep: np.ndarray) -> float:
        signals = [_off_diagonal_mean(part[np.ix_(keep, keep)]) for part in (products, others, between)]
        return signals[2] / math.sqrt(signals[0] * signals[1]) if min(signals[:2]) > 0 else math.nan

    everyone = np.arange(len(products))
    value = cosine(everyone)
    if math.isnan(value):
        return None
    ends = _interval(value, np.array([cosine(np.delete(everyone, part)) for part in everyone]))
    return _figure(min(1.0, max(-1.0, value)), ends and [max(-1.0, ends[0]), min(1.0, ends[1])])


def _off_diagonal_mean(products: np.ndarray) -> float:
    """The mean of all entries that are not on the diagonal."""
    return float((products.sum() - np.trace(products)) / (len(products) * (len(products) - 1)))


def _odds(relative: Any) -> Any:
    """trace / signal, from trace / |mean|^2."""
    return relative / (1 - relative)


def _logs(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(values)


def _figure(value: float, interval: list[Any] | None) -> dict[str, Any]:
    return {"value": float(value), "interval": interval}


def _interval(value: float, without: np.ndarray) -> list[float] | None:
    """value +/- t times the standard error of the jackknife, from the values without each of the parts. None if one of
    these is undefined."""
    if not np.isfinite(without).all():
        return None
    count = len(without)
    error = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    reach = student_quantile((1 + CONFIDENCE) / 2, count - 1) * error
    return [float(value - reach), float(value + reach)]
