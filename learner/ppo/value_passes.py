"""Extra passes over a batch that train only the critic (ppo.value_epochs). Runs in every learner rank.

They come after the policy's passes and have the same targets. A separate critic trains its network and its head. On a
shared trunk the head alone trains, on states that are computed once: the policy does not move.
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.metrics.step import StepMetrics
from common.model.packing import Sequences
from learner.ppo.experience import ExperienceBatch
from learner.ppo.frozen_states import FrozenStates, States, kept_micro_batches, values_on_states
from learner.ppo.losses import value_loss
from learner.ppo.policy_trainer import PolicyTrainer, check_finite
from learner.ppo.targets import Targets
from learner.ranks.rows import minibatches
from learner.ranks.trainer import read_together


def train_critic_alone(
    trainer: PolicyTrainer, batch: ExperienceBatch, fixed: Targets, metrics: StepMetrics
) -> dict[str, float]:
    """The passes of ppo.value_epochs, if there is a critic. Adds to `metrics`, and returns figures that are the same on
    every rank.

    Raises BatchError, on every rank, if a loss or a gradient is not finite, before that minibatch changes a weight.
    """
    started, cfg, ppo = time.perf_counter(), trainer.cfg, trainer.cfg.ppo
    if not ppo.value_epochs or not ppo.has_critic:
        return {}
    has_body = trainer.network.critic_body is not None
    critic: _Critic = (_OwnBody if has_body else _HeadAlone)(trainer, batch.sequences)
    for epoch in range(ppo.value_epochs):
        keys = [key for key, at in _LOSSES.items() if epoch == at % ppo.value_epochs]
        first = ppo.ppo_epochs + epoch  # continues the policy's epochs, so that no order repeats
        for rows in minibatches(
            len(batch.scores), epochs=1, parts=ppo.minibatches, seed=cfg.seed, step=trainer.step, first=first
        ):
            parts = _add_gradient(trainer, critic, batch, fixed, np.sort(rows))
            for key in keys:
                for tokens, total in parts:
                    metrics.add(key, total, tokens)
            metrics.add("value/epochs/grad_norm", trainer.optimizer_step())
    return {"time/value_epochs_s": time.perf_counter() - started}


class _Critic(Protocol):
    """The part of the network that these passes train."""

    def micro_batches(self, rows: np.ndarray) -> list[Tensor]:
        """This rank's share of the sorted rows of a minibatch."""

    def values(self, rows: Tensor) -> Tensor:
        """Values [b, r] of the rows of a micro-batch."""


class _OwnBody:
    """A separate critic: its network and its head."""

    def __init__(self, trainer: PolicyTrainer, sequences: Sequences) -> None:
        self._trainer, self._sequences = trainer, sequences

    def micro_batches(self, rows: np.ndarray) -> list[Tensor]:
        return self._trainer.share_of(self._sequences, rows)

    def values(self, rows: Tensor) -> Tensor:
        return self._trainer.values(self._sequences, rows)


class _HeadAlone:
    """The head on the policy's trunk, whose states are computed here, once for all passes."""

    @torch.no_grad()
    def __init__(self, trainer: PolicyTrainer, sequences: Sequences) -> None:
        self._trainer, self._sequences, self._states = trainer, sequences, FrozenStates()
        self._options = {"temperature": trainer.cfg.sampling.temperature}
        for rows in trainer.share_of(sequences, np.arange(len(sequences.lengths))):
            lengths = sequences.response_lengths[rows].tolist()
            chosen = sequences.rows(rows).to(trainer.device)
            states, *_ = trainer.forward(chosen, sum(lengths), only_states=True, **self._options)
            self._states.add(rows.tolist(), lengths, states)

    def micro_batches(self, rows: np.ndarray) -> list[Tensor]:
        lengths, budget = self._sequences.response_lengths[rows].tolist(), self._trainer.cfg.learner.token_budget
        kept = kept_micro_batches(self._states, rows.tolist(), lengths, max_tokens=budget, ranks=self._trainer.ranks)
        return [torch.from_numpy(rows[places]) for places in kept]

    def values(self, rows: Tensor) -> Tensor:
        def forward(states: States, count: int) -> Tensor:
            _, _, values = self._trainer.forward(states, count, **self._options)
            return values

        states = self._states.of(rows.tolist())
        return values_on_states(forward, self._sequences.rows(rows), states, self._trainer.device)


def _add_gradient(
    trainer: PolicyTrainer, critic: _Critic, batch: ExperienceBatch, fixed: Targets, rows: np.ndarray
) -> list[tuple[int, float]]:
    """Adds the gradient of one minibatch. Returns the tokens of each micro-batch, and the sum of their losses."""
    ppo, num_tokens = trainer.cfg.ppo, max(1, int(batch.mask[torch.from_numpy(rows)].sum()))
    parts: list[tuple[int, dict[str, Tensor]]] = []
    for chosen in critic.micro_batches(rows):
        values = critic.values(chosen)
        part = fixed.rows(chosen, values.shape[1], trainer.device)
        loss, _ = value_loss(
            values, part.old_values, part.returns, part.mask, value_clip=ppo.value_clip, num_tokens=num_tokens
        )
        trainer.backward(ppo.value_coef * loss)
        parts.append((int(fixed.mask[chosen].sum()), {"loss": loss.detach().double() * num_tokens}))
    sums = [(count, numbers["loss"]) for count, numbers in read_together(parts)]
    total = torch.tensor(sum(loss for _, loss in sums), dtype=torch.float64)
    check_finite("the loss of the critic alone", trainer.ranks.sum(total))
    return sums


_LOSSES = {"value/epochs/first_loss": 0, "value/epochs/last_loss": -1}  # by metric: the pass whose mean loss it is
