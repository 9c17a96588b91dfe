"""Settings of `ratchet train-critic` that a run of PPO does not read. Runs anywhere."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from common.config.base import Positive, Section


class CriticTrainingConfig(Section):
    """Training of a critic from journals, with `ratchet train-critic` (docs/critic.md). It also reads rollouts_per_step
    (the rollouts of an optimizer step), the reward's normalisation, ppo.gamma, [kl], [optimizer] and [learner]."""

    passes: Positive = 20
    """Most passes over the rollouts."""
    patience: Positive = 3
    """End after this many passes in which R2 on held-out prompts (1 - mean squared error / variance of the returns) has
    not risen. The critic of the best pass is kept."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts that the critic never learns from. It is evaluated on them after every pass."""
