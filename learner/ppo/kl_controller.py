"""The coefficient of the KL penalty, fixed or adaptive. Runs in every learner rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from common.config.ppo import KLConfig


class KLController(Protocol):
    """Holds the coefficient of the KL penalty."""

    coef: float

    def update(self, kl_per_response: float, num_responses: int) -> None:
        """Called after each step with the batch's KL from the reference, nats per response."""


@dataclass
class FixedKL:
    """Never changes the coefficient."""

    coef: float

    def update(self, kl_per_response: float, num_responses: int) -> None:
        pass


@dataclass
class AdaptiveKL:
    """Log-space proportional controller (Ziegler et al. 2019, section 2.2).

    The error `kl / target - 1`, clipped to +/- 0.2, changes the coefficient by the factor
    `1 + error * num_responses / horizon`.
    """

    coef: float
    target: float
    horizon: int

    def update(self, kl_per_response: float, num_responses: int) -> None:
        error = min(max(kl_per_response / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_responses / self.horizon


def kl_controller(cfg: KLConfig) -> KLController:
    """The controller that the config names."""
    return AdaptiveKL(cfg.coef, cfg.target, cfg.horizon) if cfg.controller == "adaptive" else FixedKL(cfg.coef)
