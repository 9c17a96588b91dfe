"""The network of a critic without a policy. Runs in every trainer rank.

`ratchet train-critic` trains it on existing responses. `PolicyWithCritic` (learner/ppo/policy.py) has the same value
head next to a policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config.ppo import LearnerConfig, OptimizerConfig
from common.model.compiled_layers import compile_layers
from common.model.files import load_policy
from common.model.kernels import install
from common.model.packing import Sequences
from learner.ppo.frozen import freeze
from learner.ppo.frozen_states import States
from learner.ppo.preparation import prepare, weights_dtype
from learner.ppo.value_head import critic_tensors, head_values, new_head, values_of_states


class Critic(nn.Module):
    """A critic without a policy. With learner.critic = "shared" the body is the policy's trunk as training starts, and
    stays frozen: only the head trains."""

    def __init__(self, body: PreTrainedModel, value_head: nn.Linear, *, is_shared: bool) -> None:
        super().__init__()
        self.body, self.value_head, self.is_shared = body, value_head, is_shared
        if is_shared:
            body.requires_grad_(False)

    @classmethod
    def load(cls, directory: Path, cfg: LearnerConfig, device: torch.device, *, seed: int) -> Critic:
        """A fresh critic, from the model that training starts from."""
        policy = load_policy(directory, dtype=weights_dtype(cfg), device=device, install=install)
        head, body, is_shared = new_head(policy), policy.base_model, cfg.critic == "shared"
        if is_shared:
            if cfg.compiles:
                compile_layers(body)
        else:
            freeze(body, cfg.critic_frozen)
            prepare(body, cfg, seed=seed)
        return cls(body, head, is_shared=is_shared)

    def forward(self, batch: Sequences | States, *, only_states: bool = False) -> tuple[Tensor]:
        """Values of every response token, float32: [B, R] of sequences, [n] of states. With `only_states`, the states
        of the sequences instead, [n, H]."""
        if isinstance(batch, States):
            return (values_of_states(self.value_head, batch),)
        states, _ = batch.response_states(self.body)
        return (states if only_states else batch.scatter(head_values(self.value_head, states)),)

    def parts(self, cfg: OptimizerConfig) -> list[tuple[nn.Module, float]]:
        """The parts that train, each with its peak learning rate."""
        head = (self.value_head, cfg.value_head_learning_rate)
        return [head] if self.is_shared else [head, (self.body, cfg.critic_learning_rate)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `critic_tensors`."""
        return critic_tensors(self.value_head, None if self.is_shared else self.body)
