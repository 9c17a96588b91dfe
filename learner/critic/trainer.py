"""Training of a critic on one rank, from existing responses. Runs in every critic-trainer rank."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from common.config.ppo import Config
from common.metrics.step import StepMetrics
from common.model.batches import packed_batches
from common.model.files import resolve_model
from common.model.packing import Sequences
from common.model.size import model_size
from common.model.transfer import on_device
from learner.critic.evaluation import EXPLAINED
from learner.critic.network import Critic
from learner.critic.returns import realised_returns
from learner.critic.rollouts import ROW
from learner.ppo.critic_files import TrainedCritic, save_critic
from learner.ppo.critic_quality import explained_variance
from learner.ppo.experience import ExperienceBatch
from learner.ppo.frozen_states import FrozenStatesOnDisk, States, kept_micro_batches, values_on_states
from learner.ppo.losses import value_loss
from learner.ppo.scores import RunningMoments
from learner.ranks.device import trainer_device
from learner.ranks.rows import sequence_costs
from learner.ranks.trainer import Trainer, read_together


class CriticTrainer(Trainer):
    """Fits a critic to realised returns.

    A separate critic trains its network and its head. A critic on a shared trunk trains the head alone. Its states
    never change, so `remember` computes them once.
    """

    cfg: Config
    network: Critic

    def __init__(self, cfg: Config, num_steps: int, moments: RunningMoments, run: Path) -> None:
        """`moments` normalise the scores. `run`: the run directory."""
        device = trainer_device(cfg.learner)
        directory = resolve_model(cfg.model.path, trust_remote_code=cfg.model.trust_remote_code)
        # With several ranks, each first loads the whole network on the CPU: it might not fit on one device.
        load_device = device if cfg.learner.ranks == 1 else torch.device("cpu")
        network = Critic.load(directory, cfg.learner, load_device, seed=cfg.seed)
        super().__init__(network, cfg, num_steps=num_steps, device=device)
        self._size, self._moments = model_size(directory), moments
        self._states = FrozenStatesOnDisk(run) if network.is_shared else None

    @torch.no_grad()
    def remember(self, table: pa.Table) -> None:
        """For a shared trunk: computes the states of these rollouts. Each rank keeps those of its share."""
        assert self._states is not None, "a trunk that trains has no states to keep"
        batch, numbers = ExperienceBatch.from_table(table), table[ROW].to_numpy()
        for rows in self._by_cost(batch.sequences):
            lengths = batch.sequences.response_lengths[rows].tolist()
            chosen = batch.sequences.rows(rows).to(self.device)
            (states,) = self.forward(chosen, sum(lengths), only_states=True)
            self._states.add(numbers[rows.numpy()].tolist(), lengths, states)

    def update(self, table: pa.Table) -> dict[str, float]:
        """One optimizer step on all tokens of these rollouts. Each rank takes its share. Returns the metrics, the same
        on every rank."""
        started, metrics = time.perf_counter(), StepMetrics()
        batch = ExperienceBatch.from_table(table)
        _, returns = self._returns(batch)
        scale, num_tokens = self.set_learning_rate(), max(1, int(batch.mask.sum()))
        found = torch.zeros(batch.mask.shape)
        parts: list[tuple[int, dict[str, Tensor]]] = []  # tokens of each micro-batch, and its sums by metric key
        for rows in self._share(table, batch.sequences):
            values = self._values(table, batch.sequences, rows)
            width = values.shape[1]
            wanted, mask = (on_device(x[rows, :width], self.device) for x in (returns, batch.mask))
            loss, _ = value_loss(values, values.detach(), wanted, mask, value_clip=0, num_tokens=num_tokens)
            self.backward(loss)
            found[rows, :width] = values.detach().cpu()
            parts.append((int(batch.mask[rows].sum()), {"value/loss": loss.detach().double() * num_tokens}))
        for count, numbers in read_together(parts):
            for key, total in numbers.items():
                metrics.add(key, total, count)
        self.ranks.merge(metrics)
        self.ranks.sum(found)
        norm, rate = self.optimizer_step(), self.network.parts(self.cfg.optimizer)[-1][1]
        self.step += 1
        for key, value in {
            EXPLAINED: explained_variance(found, returns, batch.mask),
            "critic/grad_norm": norm,
            "critic/learning_rate": rate * scale,
            "learner/tokens": int(batch.sequences.lengths.sum()),
            "time/learn_s": time.perf_counter() - started,
        }.items():
            metrics.add(key, value)
        return metrics.result()

    @torch.no_grad()
    def values(self, table: pa.Table) -> np.ndarray:
        """Values of every response token, float32 [B, R]. Each rank computes its share; all return the whole."""
        sequences = ExperienceBatch.from_table(table).sequences
        result = torch.zeros(sequences.response_mask.shape)
        for rows in self._share(table, sequences):
            values = self._values(table, sequences, rows)
            result[rows, : values.shape[1]] = values.cpu()
        return self.ranks.sum(result).numpy()

    def save_critic(self, target: Path, record: TrainedCritic) -> None:
        """Writes the critic as `learner.ppo.critic_files` says."""
        if self.ranks.rank > 0:  # this rank only takes part in gathering the tensors
            deque(self.network.tensors(), maxlen=0)
            return
        tensors = {name: tensor.cpu() for name, tensor in self.network.tensors()}
        save_critic(target, tensors, record, base=resolve_model(self.cfg.model.path))

    # This trainer's part of `Trainer`

    def parts(self) -> list[tuple[nn.Module, float]]:
        return self.network.parts(self.cfg.optimizer)

    def exact_modules(self) -> list[nn.Module]:
        return [self.network.value_head]

    def dummy_batch(self) -> Sequences:
        return Sequences.pack([np.zeros(1)], [np.zeros(1)]).to(self.device)

    def _returns(self, batch: ExperienceBatch) -> tuple[Tensor, Tensor]:
        cfg = self.cfg
        return realised_returns(batch, self._moments, reward=cfg.reward, kl=cfg.kl, gamma=cfg.ppo.gamma)

    def _values(self, table: pa.Table, sequences: Sequences, rows: Tensor) -> Tensor:
        """Values [b, r] of this rank's rows; r is their longest response."""
        chosen = sequences.rows(rows)
        if self._states is None:
            return self.forward(chosen.to(self.device), len(rows))[0]

        def forward(states: States, count: int) -> Tensor:
            return self.forward(states, count)[0]

        return values_on_states(
            forward, chosen, self._states.of(table[ROW].to_numpy()[rows.numpy()].tolist()), self.device
        )

    def _share(self, table: pa.Table, sequences: Sequences) -> list[Tensor]:
        """The micro-batches of this rank's share. With a frozen trunk these are the rows whose states it has."""
        if self._states is None:
            return self._by_cost(sequences)
        budget, lengths = self.cfg.learner.token_budget, sequences.response_lengths.tolist()
        kept = kept_micro_batches(self._states, table[ROW].to_pylist(), lengths, max_tokens=budget, ranks=self.ranks)
        return [torch.tensor(places).long() for places in kept]

    def _by_cost(self, sequences: Sequences) -> list[Tensor]:
        lengths = sequences.lengths.tolist()
        groups = self.micro_batches(sequence_costs(sequences, self._size), lengths, packed_batches)
        return [torch.tensor(group).long() for group in groups]
