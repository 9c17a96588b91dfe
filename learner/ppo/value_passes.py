"""Further passes over a batch that train the critic alone (ppo.value_epochs). Runs in every learner rank.

They come after the policy's passes and have the same targets. A separate critic trains its network and its head. On a
shared trunk the head alone trains, on states that are computed once: the policy does not move.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from common.metrics.step import StepMetrics
from common.model.packing import Sequences
from common.model.transfer import on_device
from learner.critic.network import head_values
from learner.ppo.experience import ExperienceBatch
from learner.ppo.losses import value_loss
from learner.ppo.policy_trainer import PolicyTrainer, check_finite
from learner.ppo.targets import Targets
from learner.ranks.rows import minibatches
from learner.ranks.trainer import read_together

# The states of the trunk for the response tokens of each row of this rank, [length, H]. They are in the machine's
# memory: those of many long responses might not fit next to the weights on a GPU.
States = Mapping[int, Tensor]


class ValuePasses(PolicyTrainer):
    """A trainer of the policy that can also train the critic alone."""

    def train_critic_alone(self, batch: ExperienceBatch, fixed: Targets, metrics: StepMetrics) -> dict[str, float]:
        """The passes of ppo.value_epochs, if there is a critic. Adds to `metrics`, and returns figures that are the
        same on every rank.

        Raises BatchError, on every rank, if a loss or a gradient is not finite, before that minibatch changes a weight.
        """
        started, ppo = time.perf_counter(), self.cfg.ppo
        if not ppo.value_epochs or not ppo.has_critic:
            return {}
        states = self._trunk_states(batch.sequences) if self.network.critic_body is None else None
        for epoch in range(ppo.value_epochs):
            keys = [key for key, at in _LOSSES.items() if epoch == at % ppo.value_epochs]
            for rows in self._value_minibatches(epoch, len(batch.scores)):
                parts = self._value_gradient(batch, fixed, rows, states)
                for key in keys:
                    for tokens, total in parts:
                        metrics.add(key, total, tokens)
                metrics.add("value/epochs/grad_norm", self.optimizer_step())
        return {"time/value_epochs_s": time.perf_counter() - started}

    def _value_minibatches(self, epoch: int, count: int) -> list[np.ndarray]:
        """The minibatches of one pass. Its order is of its own: it continues the epochs of the policy's passes."""
        ppo, cfg = self.cfg.ppo, self.cfg
        first = ppo.ppo_epochs + epoch
        return list(minibatches(count, epochs=1, parts=ppo.minibatches, seed=cfg.seed, step=self.step, first=first))

    def _value_gradient(
        self, batch: ExperienceBatch, fixed: Targets, rows: np.ndarray, states: States | None
    ) -> list[tuple[int, float]]:
        """Adds the gradient of one minibatch. Returns the tokens of each micro-batch, and the sum of their losses."""
        ppo, num_tokens = self.cfg.ppo, max(1, int(batch.mask[torch.from_numpy(rows)].sum()))
        parts: list[tuple[int, dict[str, Tensor]]] = []
        if states is None:
            micro_batches = self._micro_batches(batch.sequences, rows)
        else:  # the rows whose states this rank has, maybe none
            micro_batches = [torch.tensor([row for row in np.sort(rows).tolist() if row in states]).long()]
        for chosen in micro_batches:
            if states is None:
                values = self._values(batch.sequences, chosen)
            else:
                values = self._head_values(batch.sequences, chosen, states)
            part = fixed.rows(chosen, values.shape[1], self.device)
            loss, _ = value_loss(
                values, part.old_values, part.returns, part.mask, value_clip=ppo.value_clip, num_tokens=num_tokens
            )
            self.backward(ppo.value_coef * loss)
            parts.append((int(fixed.mask[chosen].sum()), {"loss": loss.detach().double() * num_tokens}))
        sums = [(count, numbers["loss"]) for count, numbers in read_together(parts)]
        total = torch.tensor(sum(loss for _, loss in sums), dtype=torch.float64)
        check_finite("the loss of the critic alone", self._ranks.sum(total))
        return sums

    @torch.no_grad()
    def _trunk_states(self, sequences: Sequences) -> States:
        """Those of this rank's share of the batch."""
        found: dict[int, Tensor] = {}
        for rows in self._micro_batches(sequences, np.arange(len(sequences.lengths))):
            lengths = sequences.response_lengths[rows].tolist()
            chosen = sequences.rows(rows).to(self.device)
            states, *_ = self.forward(chosen, sum(lengths), temperature=self.cfg.sampling.temperature, only_states=True)
            found |= zip(rows.tolist(), states.cpu().split(lengths), strict=True)
        return found

    def _head_values(self, sequences: Sequences, rows: Tensor, states: States) -> Tensor:
        """Values [b, r] of rows whose states are known."""
        head = self.network.value_head
        assert head is not None, "value epochs need a critic"
        if not len(rows):  # joins the others' collective operations
            return head_values(head, torch.zeros(1, head.in_features, device=self.device))[:0, None]
        flat = torch.cat([states[row] for row in rows.tolist()])
        return sequences.rows(rows).scatter(head_values(head, on_device(flat, self.device)))


_LOSSES = {"value/epochs/first_loss": 0, "value/epochs/last_loss": -1}  # the pass whose mean loss it is
