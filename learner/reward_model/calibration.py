"""Evaluation of a reward model: its accuracy and the calibration of its probabilities. Runs in the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from common.proportions import wilson_interval

EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Bin:
    """The pairs whose predicted winner has a probability in [low, high); the last bin includes 1."""

    low: float
    high: float
    pairs: int
    predicted: float  # mean probability
    right: float  # share of pairs whose human preference agrees
    interval: tuple[float, float]  # 95 %, of `right`


@dataclass(frozen=True)
class PreferenceEvaluation:
    """Held-out pairs under one version of the reward model."""

    step: int
    epoch: float
    pairs: int
    loss: float  # mean -log sigmoid(chosen - rejected), nats
    accuracy: float
    interval: tuple[float, float]  # 95 %
    margin: float  # mean chosen - rejected
    calibration_error: float  # mean |predicted - right| over pairs, by bins (Guo et al. 2017, arXiv:1706.04599, eq. 3)
    bins: tuple[Bin, ...]

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PreferenceEvaluation:
        bins = tuple(Bin(**{**entry, "interval": tuple(entry["interval"])}) for entry in record["bins"])
        known = {key: value for key, value in record.items() if key != "time"}  # the time of writing
        return cls(**{**known, "interval": tuple(record["interval"]), "bins": bins})


def evaluate_preferences(chosen: np.ndarray, rejected: np.ndarray, *, step: int, epoch: float) -> PreferenceEvaluation:
    """Evaluates the scores [N] of the chosen and of the rejected side of every pair."""
    difference = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(difference)))  # of the predicted winner, 0.5 to 1
    right = difference > 0
    bins, error = [], 0.0
    for low, high in pairwise(EDGES):
        inside = (confidence >= low) & ((confidence < high) | (high == EDGES[-1]))
        if count := int(inside.sum()):
            hits = int(right[inside].sum())
            predicted = float(confidence[inside].mean())
            bins.append(Bin(low, high, count, predicted, hits / count, wilson_interval(hits, count)))
            error += abs(predicted - hits / count) * count
    count = max(1, len(difference))
    return PreferenceEvaluation(
        step=step,
        epoch=epoch,
        pairs=len(difference),
        loss=float(np.logaddexp(0, -difference).sum()) / count,
        accuracy=float(right.sum()) / count,
        interval=wilson_interval(int(right.sum()), len(difference)),
        margin=float(difference.sum()) / count,
        calibration_error=error / count,
        bins=tuple(bins),
    )
