"""The language model with its critic: a value head on the policy's own trunk, or a separate network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config.ppo import LearnerConfig, OptimizerConfig
from common.model.files import load_policy
from common.model.kernels import install
from common.model.logprobs import Finish, chosen_logprobs
from common.model.packing import Sequences
from common.model.recomputed_layers import checkpoint_activations
from common.model.saved_weights import as_saved
from learner.ppo import lora
from learner.ranks.distributed import whole


class PolicyWithCritic(nn.Module):
    """Policy and critic from one checkpoint; the value head starts at zero, so at first it expects nothing.

    V_t is read from the state that the policy chooses response token t from: it knows the prompt and the tokens before.
    """

    def __init__(self, policy: PreTrainedModel, critic_body: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.critic_body = critic_body  # None: the policy's trunk serves both
        width = policy.get_output_embeddings().weight.shape[1]  # of the states; OPT-350m's are narrower than its layers
        self.value_head = nn.Linear(width, 1, device=policy.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @classmethod
    def load(cls, directory: Path, cfg: LearnerConfig, device: torch.device, *, seed: int) -> PolicyWithCritic:
        """In float32; with LoRA the frozen weights in the precision of the forward pass."""
        frozen_bf16 = cfg.lora is not None and cfg.precision == "bf16"
        dtype = torch.bfloat16 if frozen_bf16 else torch.float32
        policy = load_policy(directory, dtype=dtype, device=device, install=install)
        critic = None
        if cfg.critic == "separate":
            critic = load_policy(directory, dtype=dtype, device=device, install=install).base_model
        for model in filter(None, (policy, critic)):
            if cfg.lora is not None:
                lora.add(model, cfg.lora, seed=seed)
            if cfg.gradient_checkpointing:
                checkpoint_activations(model)
        return cls(policy, critic)

    def forward(
        self, sequences: Sequences, *, temperature: float, reference: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """logprobs, entropy and values of every response token, float32 [B, R].

        With `reference` the log-probabilities are those of the weights that LoRA's adapters started from.
        """
        with lora.off(self.policy) if reference else nullcontext():
            states, token_ids = sequences.response_states(self.policy.base_model)
        head, finish = self.policy.get_output_embeddings(), Finish.of(self.policy.config)
        logprobs, entropy = chosen_logprobs(states, token_ids, head, temperature=temperature, finish=finish)
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
        """The policy's weights under the names of `save_pretrained`, tied ones once, LoRA's adapters merged.

        They are gathered from all ranks as they are asked for, at most a layer at a time, so every rank must run
        through them together.
        """
        return as_saved(self.policy, lora.merged(self.policy))

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's LoRA adapters, gathered as above; none without LoRA."""
        for name, parameter in self.policy.named_parameters():
            if lora.is_adapter(name):
                yield name, whole(parameter)
