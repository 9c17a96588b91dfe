"""A trainer whose network is the policy with its critic: how it is loaded, measured, published and saved.

Runs in every learner rank. `Learner` adds the update.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.config.ppo import Config
from common.errors import BatchError
from common.model.batches import packed_batches
from common.model.files import resolve_model, save_policy
from common.model.packing import Sequences
from common.model.size import model_size
from common.types import Rollout
from common.weights import Bucket, Delta, Manifest, buckets, publication
from learner.ppo import lora
from learner.ppo.policy import PolicyWithCritic
from learner.ranks.device import trainer_device
from learner.ranks.rows import sequence_costs
from learner.ranks.trainer import Trainer

Outputs = tuple[Tensor, Tensor, Tensor | None]  # logprobs, entropy, values, [b, r] of a micro-batch


class PolicyTrainer(Trainer):
    """Holds the policy, and its critic if the advantages need one."""

    cfg: Config
    network: PolicyWithCritic

    def __init__(self, cfg: Config, *, critic: Path | None = None) -> None:
        """`critic`: the directory of a trained critic to begin with."""
        device = trainer_device(cfg.learner, lent=cfg.lent_share)
        directory = resolve_model(cfg.model.path, trust_remote_code=cfg.model.trust_remote_code)
        # With several ranks, each first loads the whole network on the CPU: it might not fit on one device.
        load_device = device if cfg.learner.ranks == 1 else torch.device("cpu")
        network = PolicyWithCritic.load(
            directory, cfg.learner, load_device, has_critic=cfg.ppo.has_critic, seed=cfg.seed, critic=critic
        )
        super().__init__(network, cfg, num_steps=cfg.num_steps, device=device, borrows=cfg.lent_share > 0)
        self._size = model_size(directory)

    @property
    def policy_version(self) -> int:
        """The version of the current weights: the updates done, because each is published once."""
        return self.step

    def policy_logprobs(self, *rollouts: Rollout) -> list[np.ndarray]:
        """Log-probabilities of each rollout's response, float32 [R], nats."""
        return self._logprobs(rollouts, reference=False)

    def ref_logprobs(self, *rollouts: Rollout) -> list[np.ndarray]:
        """With LoRA: log-probabilities of each rollout's response without the adapters, float32 [R], nats."""
        return self._logprobs(rollouts, reference=True)

    def publish(self, *base: Bucket) -> Iterator[Bucket | Delta | Manifest]:
        """The policy's weights as a `publication`, with deltas against the buckets of `base` if there are any. Ranks
        other than 0 help to gather the tensors, and publish only an empty manifest."""
        tensors = self.network.policy_tensors()
        if self.ranks.rank > 0:
            deque(tensors, maxlen=0)
        yield from publication(buckets(tensors, self.policy_version), base)

    def save_policy(self, directory: Path, *, adapter: Path | None = None, card: str | None = None) -> None:
        """Writes the policy as a Hugging Face directory, with LoRA's adapters merged, and `card` as its README.md. The
        adapters alone go to `adapter`, by default a directory next to the policy's."""
        if self.ranks.rank > 0:  # this rank only takes part in gathering the tensors
            deque(chain(self.network.policy_tensors(), self.network.adapter_tensors()), maxlen=0)
            return
        base = resolve_model(self.cfg.model.path)
        tensors = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in self.network.policy_tensors()}
        adapters = {name: tensor.cpu() for name, tensor in self.network.adapter_tensors()}
        save_policy(tensors, base, directory, card=card)
        if self.cfg.learner.lora:
            lora.save(adapters, self.cfg.learner.lora, str(base), adapter or directory.with_name("adapter"))

    # This trainer's part of `Trainer`

    def parts(self) -> list[tuple[nn.Module, float]]:
        return self.network.parts(self.cfg.optimizer)

    def exact_modules(self) -> list[nn.Module]:
        return [] if self.network.value_head is None else [self.network.value_head]

    def dummy_batch(self) -> Sequences:
        return Sequences.pack([np.zeros(1)], [np.zeros(1)]).to(self.device)

    # Forward passes over chosen rows

    def outputs(self, sequences: Sequences, rows: Tensor, *, reference: bool = False) -> Outputs:
        chosen, temperature = sequences.rows(rows).to(self.device), self.cfg.sampling.temperature
        logprobs, entropy, values = self.forward(chosen, len(rows), temperature=temperature, reference=reference)
        return logprobs, entropy, values

    def values(self, sequences: Sequences, rows: Tensor) -> Tensor:
        """Values alone, [b, r]."""
        chosen, temperature = sequences.rows(rows).to(self.device), self.cfg.sampling.temperature
        _, _, values = self.forward(chosen, len(rows), temperature=temperature, only_values=True)
        return values

    def _logprobs(self, rollouts: Sequence[Rollout], *, reference: bool) -> list[np.ndarray]:
        tokens = [r.prompt.token_ids for r in rollouts], [r.response_ids for r in rollouts]
        sequences = Sequences.pack(*tokens, [r.response_mask for r in rollouts], [r.context_starts for r in rollouts])
        result = torch.zeros(sequences.response_mask.shape)
        with torch.no_grad():
            for rows in self.share_of(sequences, np.arange(len(rollouts))):
                logprobs, _, _ = self.outputs(sequences, rows, reference=reference)
                result[rows, : logprobs.shape[1]] = logprobs.cpu()
        self.ranks.sum(result)
        return [row[: len(r.rollout_logprobs)] for row, r in zip(result.numpy(), rollouts, strict=True)]

    def share_of(self, sequences: Sequences, rows: np.ndarray) -> list[Tensor]:
        """This rank's share of the rows, packed under the token budget. Sorted first: a minibatch is a set, and its
        micro-batches should not depend on its order."""
        chosen = torch.from_numpy(np.sort(rows))
        minibatch = sequences.rows(chosen)
        costs, lengths = sequence_costs(minibatch, self._size), minibatch.lengths.tolist()
        return [chosen[group] for group in self.micro_batches(costs, lengths, packed_batches)]


def check_finite(what: str, values: Tensor, error: type[BatchError] = BatchError) -> None:
    """Raises the error if a value is not finite. The values are the same on every rank."""
    if not bool(torch.isfinite(values).all()):
        raise error(f"{what} is not finite ({values[~torch.isfinite(values)].flatten()[0].item()})")
