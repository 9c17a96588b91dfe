"""The evaluation of a critic on held-out prompts: what it explains of the realised returns. Runs in the driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from learner.ppo.critic_quality import POSITIONS, positions, quality_of_tokens

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
    """The response tokens of some rollouts, one rollout after another, with the values that a critic gave them. A token
    takes 9 bytes; padding would take many times as much."""

    rollouts: int
    values: np.ndarray  # float32 [n]
    returns: np.ndarray  # float32 [n]
    positions: np.ndarray  # uint8 [n]; bit k is set where the token is in part k of POSITIONS
    scores: np.ndarray  # float32, of the rollouts that have tokens

    @classmethod
    def of(cls, values: np.ndarray, returns: np.ndarray, scores: np.ndarray, mask: np.ndarray) -> Predicted:
        """values, returns, mask [B, R]; scores [B]."""
        parts = positions(mask)
        bits = [parts[name][mask].astype(np.uint8) << bit for bit, name in enumerate(POSITIONS)]
        return cls(len(mask), values[mask], returns[mask], np.bitwise_or.reduce(bits), scores[mask.any(1)])


def evaluate_critic(found: Sequence[Predicted], *, step: int, epoch: float) -> CriticEvaluation:
    """Evaluates the parts together."""
    values, returns, codes, scores = (
        np.concatenate([getattr(part, name) for part in found]) for name in ("values", "returns", "positions", "scores")
    )
    parts = {name: (codes & (1 << bit)).astype(bool) for bit, name in enumerate(POSITIONS)}
    figures = quality_of_tokens(values, returns, parts, scores)
    for name, part in parts.items():
        figures[f"value/returns_var/{name}"] = float(returns[part].astype(np.float64).var()) if part.any() else 0.0
    errors = (values - returns).astype(np.float64)
    return CriticEvaluation(
        step=step,
        epoch=epoch,
        rollouts=sum(part.rollouts for part in found),
        tokens=len(errors),
        loss=float((errors**2).mean() / 2),
        figures=figures,
    )


def best_of(evaluations: Iterable[CriticEvaluation]) -> CriticEvaluation:
    """The first one with the highest R2."""
    return max(evaluations, key=lambda evaluation: (evaluation.r2, -evaluation.step))
