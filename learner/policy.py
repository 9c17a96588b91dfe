"""The language model with its critic: a value head on the policy's own trunk, or a separate network."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config import OptimizerConfig
from common.logprobs import chosen_logprobs
from common.sequences import Sequences


class PolicyWithCritic(nn.Module):
    """Policy and critic from one checkpoint; the value head starts at zero, so at first it expects nothing.

    V_t is read from the state that the policy chooses response token t from: it knows the prompt and the tokens before.
    """

    def __init__(self, policy: PreTrainedModel, critic_body: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.critic_body = critic_body  # None: the policy's trunk serves both
        self.value_head = nn.Linear(policy.config.hidden_size, 1, device=policy.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, sequences: Sequences, *, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """logprobs, entropy and values of every response token, float32 [B, R]."""
        states, token_ids = sequences.response_states(self.policy.base_model)
        head = self.policy.get_output_embeddings()
        logprobs, entropy = chosen_logprobs(states, token_ids, head, temperature=temperature)
        if self.critic_body is not None:
            states, _ = sequences.response_states(self.critic_body)
        with torch.autocast(states.device.type, enabled=False):  # eight bits would be a coarse value
            values = self.value_head(states.float()).squeeze(-1)
        return sequences.scatter(logprobs), sequences.scatter(entropy), sequences.scatter(values)

    def parts(self, cfg: OptimizerConfig) -> list[tuple[nn.Module, float]]:
        """Each part with its peak learning rate."""
        parts = [(self.policy, cfg.learning_rate), (self.value_head, cfg.value_head_learning_rate)]
        return parts if self.critic_body is None else [*parts, (self.critic_body, cfg.critic_learning_rate)]

    def policy_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights under their Hugging Face names, tied ones once."""
        for name, parameter in self.policy.named_parameters():
            yield name, parameter.detach()
