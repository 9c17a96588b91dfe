"""The evaluation of a critic on held-out prompts: what it explains of the realised returns. Runs in the driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from learner.ppo.critic_quality import critic_quality, positions

EXPLAINED = "value/explained_variance/realised"
R2 = "value/r2"
_VARIANCE = "value/returns_var/realised"


@dataclass(frozen=True)
class CriticEvaluation:
    """The held-out rollouts under one version of the critic."""

    step: int
    epoch: float  # passes done
    rollouts: int
    tokens: int
    loss: float  # half the squared error, mean over tokens
    figures: Mapping[str, float]  # of learner.ppo.critic_quality, and the variance of the returns by position

    @property
    def explained(self) -> float:
        """Explained variance over all tokens. It ignores an error that is the same at every token."""
        return self.figures[EXPLAINED]

    @property
    def r2(self) -> float:
        """R2, the coefficient of determination over all tokens: 1 - mean squared error / variance of the returns. It is
        the explained variance if the mean value is right, and lower otherwise. Training keeps the critic that has the
        highest."""
        variance = self.figures[_VARIANCE]
        return 1 - 2 * self.loss / variance if variance else 0.0

    def record(self) -> dict[str, Any]:
        return {**{key: getattr(self, key) for key in _OWN}, R2: self.r2, **self.figures}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CriticEvaluation:
        own = {key: record[key] for key in _OWN}
        figures = {key: float(value) for key, value in record.items() if key not in (*_OWN, R2, "time")}
        if missing := {EXPLAINED, _VARIANCE} - figures.keys():
            raise KeyError(min(missing))
        return cls(**own, figures=figures)


_OWN = ("step", "epoch", "rollouts", "tokens", "loss")


@dataclass(frozen=True)
class Predicted:
    """Some rollouts with the values that a critic gave them; R is their longest response."""

    values: np.ndarray  # float32 [B, R]
    returns: np.ndarray  # float32 [B, R]
    scores: np.ndarray  # float32 [B]
    mask: np.ndarray  # bool [B, R]


def evaluate_critic(parts: Iterable[Predicted], *, step: int, epoch: float) -> CriticEvaluation:
    """Evaluates the parts together."""
    found = list(parts)
    values, returns, mask = (
        _stacked([getattr(part, name) for part in found]) for name in ("values", "returns", "mask")
    )
    errors = (values - returns)[mask].astype(np.float64)
    figures = critic_quality(values, returns, np.concatenate([part.scores for part in found]), mask)
    for name, part in positions(mask).items():
        figures[f"value/returns_var/{name}"] = float(returns[part].astype(np.float64).var()) if part.any() else 0.0
    return CriticEvaluation(
        step=step,
        epoch=epoch,
        rollouts=len(mask),
        tokens=len(errors),
        loss=float((errors**2).mean() / 2),
        figures=figures,
    )


def best_of(evaluations: Iterable[CriticEvaluation]) -> CriticEvaluation:
    """The first one with the highest R2."""
    return max(evaluations, key=lambda evaluation: (evaluation.r2, -evaluation.step))


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """[B, R] arrays of several widths below each other, with zeros at the ends of shorter rows."""
    whole = np.zeros((sum(map(len, arrays)), max(array.shape[1] for array in arrays)), arrays[0].dtype)
    start = 0
    for array in arrays:
        whole[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return whole
